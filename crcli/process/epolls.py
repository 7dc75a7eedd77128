"""Epolls that wait for a file which their process has closed: CRIU gives up on those (eventpoll.c).

A file stays in an epoll until nobody has it open. CRIU asks the first process that holds the epoll, and finds
the file there also under another number; so do we, with kcmp(2).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from crcli import kernel
from crcli.process.files import OpenFile

_TARGET = re.compile(r"^tfd:\s*(\d+) .* ino:([0-9a-f]+) ", re.MULTILINE)


def epolls_astray(files: Iterable[OpenFile]) -> tuple[OpenFile, ...]:
    """Return the epolls with a target that is not open in the first process that holds them."""
    by_process: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    epolls: dict[str, OpenFile] = {}
    for file in files:
        by_process[file.pid][file.ino].append(file.fd)
        if file.anon_name == "eventpoll":
            epolls.setdefault(file.info, file)
    return tuple(epoll for epoll in epolls.values() if _is_astray(epoll, by_process[epoll.pid]))


def _is_astray(epoll: OpenFile, open_by_inode: dict[int, list[int]]) -> bool:
    seen: Counter[int] = Counter()
    for number, inode in _TARGET.findall(epoll.info):
        target = int(number)
        candidates = sorted(open_by_inode.get(int(inode, 16), ()), key=lambda fd: fd != target)
        if not any(_is_target(epoll, target, seen[target], fd) for fd in candidates):
            return True
        seen[target] += 1
    return False


def _is_target(epoll: OpenFile, target: int, index: int, fd: int) -> bool:
    """Whether this descriptor is what the epoll has as number `target`, the `index`-th of that number."""
    try:
        return kernel.is_epoll_target(epoll.pid, fd, epoll.fd, target, index)
    except OSError:
        return True  # not to be known here, or closed meanwhile: CRIU will see

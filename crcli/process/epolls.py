"""Epolls that wait for a file which their process has closed: CRIU gives up on those (eventpoll.c).

A file stays in an epoll until nobody has it open. CRIU asks the first process that holds the epoll, and finds
the file there also under another number; so do we, with kcmp(2).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import takewhile

from crcli import kernel
from crcli.process.files import OpenFile, open_files, read_open_file

_ByInode = dict[int, list[int]]
"""The descriptors of a process, by the inode of what they refer to."""

_TARGET = re.compile(r"^tfd:\s*(\d+) .* ino:([0-9a-f]+) ", re.MULTILINE)


def epolls_astray(files: Iterable[OpenFile]) -> tuple[OpenFile, ...]:
    """Return the epolls with a target that is not open in the first process that holds them."""
    by_process: dict[int, _ByInode] = defaultdict(lambda: defaultdict(list))
    epolls: dict[str, OpenFile] = {}
    for file in files:
        by_process[file.pid][file.ino].append(file.fd)
        if file.anon_name == "eventpoll":
            epolls.setdefault(file.info, file)
    astray: list[OpenFile] = []
    for epoll in epolls.values():
        if _astray(epoll, by_process[epoll.pid]) and not _is_passing(epoll, epolls.values()):
            astray.append(epoll)
    return tuple(astray)


def _is_passing(epoll: OpenFile, epolls: Iterable[OpenFile]) -> bool:
    """Whether it only looked so: a busy program opened or closed the target while its files were listed, or
    added one to an epoll that its child has as well, so that this looked like another epoll."""
    earlier = takewhile(lambda other: other is not epoll, epolls)
    try:
        if any(kernel.is_same_open_file(epoll.pid, epoll.fd, other.pid, other.fd) for other in earlier):
            return True
    except OSError:
        return True  # ended, or closed, meanwhile
    before = read_open_file(epoll.pid, epoll.fd)
    by_inode: _ByInode = defaultdict(list)
    for file in open_files(epoll.pid):
        by_inode[file.ino].append(file.fd)
    after = read_open_file(epoll.pid, epoll.fd)
    if before is None or after is None:
        return True
    return not _astray(before, by_inode).intersection(_TARGET.findall(after.info))


def _astray(epoll: OpenFile, open_by_inode: _ByInode) -> set[tuple[str, str]]:
    """Return the targets, number and inode as the kernel writes them, that are not open."""
    astray = set()
    seen: Counter[int] = Counter()
    for number, inode in _TARGET.findall(epoll.info):
        target = int(number)
        candidates = sorted(open_by_inode.get(int(inode, 16), ()), key=lambda fd: fd != target)
        if not any(_is_target(epoll, target, seen[target], fd) for fd in candidates):
            astray.add((number, inode))
        seen[target] += 1
    return astray


def _is_target(epoll: OpenFile, target: int, index: int, fd: int) -> bool:
    """Whether this descriptor is what the epoll has as number `target`, the `index`-th of that number."""
    try:
        return kernel.is_epoll_target(epoll.pid, fd, epoll.fd, target, index)
    except OSError:
        return True  # not to be known here, or closed meanwhile: CRIU will see

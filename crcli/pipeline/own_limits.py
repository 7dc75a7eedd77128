"""crcli's own limits (`ulimit`), which CRIU inherits: soft ones are lifted while there is work to do.

Hard ones that are too small are named.

Of files above all: a dump and a restore have more of them open than most, and CRIU's images and the memory of
a tree lie in files meanwhile, if in memory; at a limit of their size a signal of the kernel's ends CRIU.
"""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.errors import HostLacks, TreeState

if TYPE_CHECKING:
    from collections.abc import Iterator

_BESIDE = 128 << 20
"""What there must be room for beside a tree's memory (bytes): a pack, a part of an upload, CRIU's images."""

_WITHOUT = resource.RLIM_INFINITY


_LIFTED = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_NPROC,
)


@contextmanager
def limits_lifted() -> Iterator[None]:
    """Within the block we may use what the hard limits allow, and write files of any size where we may let
    ourselves; afterwards it is as before.

    Processes of a tree have limits of their own, which CRIU gives back. Raises HostLacks where hard limits
    leave too little to begin anything.
    """
    see_hard_limits()
    before = {number: resource.getrlimit(number) for number in _LIFTED}
    for number, (soft, hard) in before.items():
        if soft != hard:
            resource.setrlimit(number, (hard, hard))
    if before[resource.RLIMIT_FSIZE][1] != _WITHOUT:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_WITHOUT, _WITHOUT))
        except (OSError, ValueError):
            pass  # that takes CAP_SYS_RESOURCE
    try:
        yield
    finally:
        for number, limits in before.items():
            if limits[0] != limits[1] or number == resource.RLIMIT_FSIZE:
                resource.setrlimit(number, limits)


def see_hard_limits() -> None:
    """Raise HostLacks where hard limits leave too little memory, or too few descriptors, for any tree."""
    if any(limit < _LEAST[name] for name, limit in _limits_of_memory().items()):
        raise _too_little("memory", TreeState.UNTOUCHED)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < _LEAST_FILES:
        raise _too_few_files(TreeState.UNTOUCHED)


def see_file_size(memory_bytes: int) -> None:
    """Raise HostLacks where no file may be written that is large enough for this much memory of a tree."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = memory_bytes + _BESIDE
    if limit != _WITHOUT and limit < needed:
        raise HostLacks(
            f"crcli may write no file larger than {limit} bytes here (RLIMIT_FSIZE), and needs one of "
            f"{needed}",
            hint="start it with a larger hard limit: `ulimit -f unlimited`, LimitFSIZE= of systemd",
        )


_OF_MEMORY = {
    "RLIMIT_DATA": "`ulimit -d unlimited`, LimitDATA= of systemd",
    "RLIMIT_AS": "`ulimit -v unlimited`, LimitAS= of systemd",
}
"""Limits of what memory a process gets, and how they are raised."""

_LEAST = {"RLIMIT_DATA": 128 << 20, "RLIMIT_AS": 256 << 20}
"""With less nothing can be dumped or restored, and what fails first is anybody's guess (bytes)."""


_LEAST_FILES = 128
"""How many descriptors a restore takes at least, most of them CRIU's own."""


def shortage(error: BaseException) -> HostLacks | None:
    """What to report in place of an error that says that we got no memory, thread or descriptor; None for
    others.

    Its state of the tree is the error's.
    """
    state = getattr(error, "state", TreeState.UNTOUCHED)
    if isinstance(error, OSError | ImportError) and os.strerror(errno.EMFILE) in str(error):
        return _too_few_files(state)
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    no_module = isinstance(error, ImportError) and "failed to map segment" in str(error)
    if not isinstance(error, MemoryError) and not no_thread and not no_module:
        return None
    return _too_little("threads" if no_thread else "memory", state)


def _limits_of_memory() -> dict[str, int]:
    """The hard limits that there are, by name (bytes)."""
    limits = {name: resource.getrlimit(getattr(resource, name))[1] for name in _OF_MEMORY}
    return {name: limit for name, limit in limits.items() if limit != _WITHOUT}


def _too_few_files(state: TreeState) -> HostLacks:
    return HostLacks(
        f"crcli may not have as many files open as it needs, {_LEAST_FILES} or more (RLIMIT_NOFILE)",
        hint="start it with a larger limit: `ulimit -n 1024`, LimitNOFILE= of systemd",
        state=state,
    )


def _too_little(what: str, state: TreeState) -> HostLacks:
    limits = _limits_of_memory()
    if not limits:
        remedy = "free memory, or raise the limits of crcli's cgroup (memory.max, pids.max)"
        return HostLacks(f"crcli gets no more {what} here", hint=remedy, state=state)
    named = " and ".join(f"{limit} bytes ({name})" for name, limit in limits.items())
    remedy = "; ".join(_OF_MEMORY[name] for name in limits)
    return HostLacks(
        f"crcli gets too {'few' if what == 'threads' else 'little'} {what}: its hard limits are {named}",
        hint=f"start it with larger ones: {remedy}",
        state=state,
    )

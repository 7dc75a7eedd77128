"""CRIU's log, read for us: the one line that matters, and what it means."""

from __future__ import annotations

import re
from typing import NamedTuple


class Cause(NamedTuple):
    """What made CRIU give up, as it said it, and what the user can do (may be empty)."""

    text: str
    hint: str


_ERROR = re.compile(r"Error \([^)]*\): (.*)")

_HARMLESS = (
    "rlimit: Can't setup RLIMIT_NOFILE for self",
    "Can't keep kdat cache",
    "Aborting restore due to",
    "Pre-resume script",
    "Post-resume script",
    "RPC client reported script error",
)
_CONSEQUENCES = (
    "Restoring FAILED",
    "Dumping FAILED",
    "Dump ",
    "Killing processes because of failure",
    "Can't unfreeze",
)

PID_TAKEN = re.compile(r"Can't fork for (\d+): File exists")

_KNOWN: tuple[tuple[str, str], ...] = (
    (PID_TAKEN.pattern, "pid {0} is in use; try --pid-namespace new"),
    (
        r"File (\S+) has bad size",
        "{0} changed since the dump; put the old version back, or use --files image",
    ),
    (r"File (\S+) has bad build-ID", "{0} was updated since the dump; restore needs the version of then"),
    (r"Can't open file (\S+) on restore", "{0} is missing here; copy it from the host of the dump"),
    (r"Can't open cwd", "the working folder of a process is missing here; create it"),
    (
        r"anon_inode:\[io_uring\]",
        "a process uses io_uring, which CRIU cannot save; for Node set UV_USE_IO_URING=0",
    ),
    (r"Can't bind inet socket", "the address or port is taken or not ours here; see --tcp"),
    (r"Can't get rlimit", "a process runs as another user and crcli lacks CAP_SYS_RESOURCE"),
    (
        r"Unable to interrupt task: (\d+)",
        "process {0} is traced by a debugger, or ended meanwhile; try again",
    ),
    (
        r"nested (\w+) namespace",
        "a process of the tree lives in a {0} namespace of its own; wait until it ends",
    ),
    (
        r"Can't restore sub-task in NS",
        "a process of the tree lives in namespaces of its own; wait until it ends",
    ),
    (
        r"capability requirements|Unable to restore capabilities",
        "this host does not let CRIU give back a capability",
    ),
    (r"FPU feature required|CPU (\w+ )?capabilit", "this CPU lacks what the programs were started with"),
    (
        r"doesn't live in IPC ns",
        "the tree uses SysV shared memory of the host; start it in its own IPC namespace",
    ),
)


def explain(log: str) -> Cause:
    """Return the first error in a log of CRIU's that is a cause, not a consequence, with its remedy."""
    errors = [match[1].strip() for line in log.splitlines() if (match := _ERROR.search(line))]
    causes = [e for e in errors if not e.startswith(_HARMLESS)]
    first = [e for e in causes if not e.startswith(_CONSEQUENCES)] or causes
    for error in first:
        for pattern, hint in _KNOWN:
            if match := re.search(pattern, error):
                return Cause(error, hint.format(*match.groups()))
    if first:
        return Cause(first[0], "")
    tail = [line for line in log.splitlines() if line.strip()]
    return Cause(tail[-1] if tail else "CRIU wrote no log", "")

"""What stays of a question that CRIU asks the kernel when it is killed just then.

Where it may keep no answers (see crcli.criu.kerndat) CRIU asks at each start whether a mount can be given to
another's group. For that it makes a folder in /tmp, and mounts something there.
"""

from __future__ import annotations

import os
import time

from crcli import kernel

_PREFIX = ".criu.move_mount_set_group."
_LIMIT_S = 1.0
"""How long a CRIU that lives has its folder, at most (seconds): it takes a millisecond."""
_CLOCK_STEP_S = 0.02
"""By how much the clock that dates files is behind, at most (seconds)."""


def remove_question(since: float, root: str = "/") -> None:
    """Remove what a CRIU that was started at `since` (time.time()), and killed, has left below `root`, of
    the folder in /tmp in which it asked. Never raises.

    The folders of other CRIUs look alike: they are gone after a moment, so one that stays is nobody's.
    """
    end = time.monotonic() + _LIMIT_S
    folder = os.path.join(root, "tmp")
    left = _questions(folder, since - _CLOCK_STEP_S)
    while left and time.monotonic() < end:
        time.sleep(0.01)
        left &= _questions(folder, since - _CLOCK_STEP_S)
    for path in left:
        try:
            if os.path.ismount(path):
                kernel.unmount(path)
            os.rmdir(path)
        except OSError:
            continue


def _questions(folder: str, since: float) -> set[str]:
    """The folders of ours in which CRIUs ask, or have asked, since then."""
    found = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(_PREFIX):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_uid == os.geteuid() and status.st_ctime >= since:
                        found.add(entry.path)
    except OSError:
        pass
    return found

"""One case, from its start to its verdict, in a process of its own: `python -m tests.zdtm.worker`.

As under CRIU's own runner, the case, its hooks and crcli live together in namespaces of their own, where the
worker is process 1: pids and ports are free, some programs look at process 1, and whatever is left of it all
(processes, packet filters, mounts) ends with the worker.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from crcli import kernel
from tests.support.crcli import tree_of
from tests.zdtm.program import CannotStart, Failed, Program, end_all, reap_ended
from tests.zdtm.suite import Case, cases
from tests.zdtm.ways import Crcli, Raw, Way

_NAMED_NETWORKS = "/run/netns"


def main() -> int:
    """Run the case, print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tests.zdtm.worker", description=__doc__)
    parser.add_argument("source", type=Path, help="CRIU's source")
    parser.add_argument("name", help="of the case")
    parser.add_argument("folder", type=Path, help="an empty folder, for the store and logs")
    parser.add_argument("--raw", action="store_true", help="CRIU itself instead of crcli")
    parser.add_argument("--lazy", action="store_true", help="restore lazily")
    parser.add_argument("--again", action="store_true", help="dump with --leave-running first")
    options = parser.parse_args()
    _live_apart()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _look_apart()
    case = next(case for case in cases(options.source) if case.name == options.name)
    way = _way(options, case)
    began = time.monotonic()
    try:
        status, reason = _verdict(case, way, options.folder)
    finally:
        end_all()
    seconds = round(time.monotonic() - began, 2)
    print(json.dumps({"status": status, "reason": reason, "findings": way.findings, "seconds": seconds}))
    return 0


def _way(options: argparse.Namespace, case: Case) -> Way:
    if options.raw:
        return Raw(options.folder, "suid" not in case.flags)
    return Crcli(case.name, options.folder, lazy=options.lazy, again=options.again)


def _live_apart() -> None:
    """Children of this process will be in new namespaces. They end with it."""
    kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)


def _look_apart() -> None:
    """As process 1 of the new namespaces, see their processes, terminals and networks."""
    kernel.die_with_parent(signal.SIGKILL)
    kernel.unmount("/proc")
    kernel.mount("proc", "/proc", "proc")
    kernel.mount("devpts", "/dev/pts", "devpts", data="newinstance,ptmxmode=0666")
    kernel.mount("/dev/pts/ptmx", "/dev/ptmx", "", kernel.MS_BIND)
    os.makedirs(_NAMED_NETWORKS, exist_ok=True)
    kernel.mount("tmpfs", _NAMED_NETWORKS, "tmpfs")
    kernel.loopback_up()


def _verdict(case: Case, way: Way, folder: Path) -> tuple[str, str]:
    program = Program(case, folder)
    try:
        program.start()
        return _moved(program, way)
    except CannotStart as error:
        return "NOSTART", str(error)
    except Failed as error:
        return "FAIL", str(error)
    finally:
        _clean_up(program)


def _moved(program: Program, way: Way) -> tuple[str, str]:
    """Move a program that has started, and judge it."""
    expected = "crfail" in program.case.flags
    program.hook("--pre-dump")
    tree = tree_of(program.pid)
    try:
        way.dump(program.pid)
    except Failed as error:
        if not expected:
            raise
        program.stop()  # it has to be as well as before
        return "XFAIL", str(error)
    program.went(tree)
    program.hook("--pre-restore")
    program.came_back(way.restore())
    program.hook("--post-restore")
    program.stop()
    return ("XPASS" if expected else "PASS"), ""


def _clean_up(program: Program) -> None:
    """Let the case tidy up, whatever became of it: what is wrong with that is nobody's verdict."""
    try:
        program.hook("--clean")
    except (Failed, OSError, ValueError):
        pass
    end_all()
    program.clean()
    reap_ended()


if __name__ == "__main__":
    sys.exit(main())

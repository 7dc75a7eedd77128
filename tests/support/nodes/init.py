"""The first process of a namespace node: `unshare … python init.py FOLDER NAME PIDS BINDS…`.

It makes the node's root (a writable layer over this host's), says `ready`, and reaps until it is killed: that
ends all that runs there. FOLDER is empty, and only this node's mounts fill it. PIDS is where its pids begin.
BINDS are folders of the host that the node is to see as they are, wherever they are mounted here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from crcli import kernel

_OWN = ("var/lib/crcli", "var/cache/crcli", "var/log/crcli", "var/lib/jobs")
"""What this host has there is no affair of the node's."""


def main(folder: str, name: str, pids: str, *binds: str) -> None:
    """Be the node until killed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    root = _root_in(folder)
    for path in binds:
        os.makedirs(root + path, exist_ok=True)
        kernel.mount(path, root + path, "", kernel.MS_BIND | kernel.MS_REC)
    for path in _OWN:
        shutil.rmtree(f"{root}/{path}", ignore_errors=True)
    kernel.change_root(root)
    socket.sethostname(name)
    Path("/proc/sys/kernel/ns_last_pid").write_text(pids)
    kernel.loopback_up()
    print("ready", flush=True)
    while signal.sigwait({signal.SIGCHLD}):
        _reap()


def _root_in(folder: str) -> str:
    """Mount a root in the folder: an overlay with the kernel's own file systems in it, and its own memory."""
    kernel.mount("tmpfs", folder, "tmpfs", 0, "mode=0755")
    layers = {kind: f"{folder}/{kind}" for kind in ("upper", "work", "root")}
    for path in layers.values():
        os.mkdir(path, 0o755)
    root = layers["root"]
    options = f"lowerdir=/,upperdir={layers['upper']},workdir={layers['work']}"
    kernel.mount("overlay", root, "overlay", 0, options)
    kernel.mount("proc", f"{root}/proc", "proc")
    kernel.mount("sysfs", f"{root}/sys", "sysfs")
    for path in ("sys/fs/cgroup", "dev"):
        kernel.mount(
            f"/{path}", f"{root}/{path}", "", kernel.MS_BIND | (kernel.MS_REC if path != "dev" else 0)
        )
    kernel.mount("devpts", f"{root}/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=0620")
    for path in ("dev/shm", "tmp", "run"):
        kernel.mount("tmpfs", f"{root}/{path}", "tmpfs", 0, "mode=1777")
    return root


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])

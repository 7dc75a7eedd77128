"""What CRIU finds out about the kernel, kept where CRIU itself keeps nothing.

At each start CRIU asks the kernel a hundred questions (25 ms and more), and keeps the answers in
/run/criu.kdat: but only if that lies on a tmpfs, which goes with the kernel that it describes. In containers
/run seldom is one, and a trial asks while a tree stands frozen. So a trial gets a /run that is a tmpfs, in
which everything of the real one is found again. What CRIU puts there is kept for the trials to come, for
this boot, this CRIU and these rights. Where nothing is kept yet, it is asked before the freeze. CRIU itself
refuses a cache that is not of its own build.

Dumps, and restores of more than a trial, work in the real /run: their CRIU is lent what is kept. A dump that
is to leave pages in the tree (see left_pages.py) is lent other answers, wherever /run lies.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli import kernel
from crcli.config import state_folder
from crcli.criu.binary import criu_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.criu.workspace import Workspace

FOLDER = "/run"
_NAME = "criu.kdat"
PATH = f"{FOLDER}/{_NAME}"
_OWN_NAME = "own.kdat"
"""Where CRIU's own file is while it is lent others: one that is lost, should we be killed, it writes anew."""
_OWN_FILES = "/proc/self/fd/"
_MOST_ENTRIES = 200
"""A /run with more in it than this is left as it is."""

_QUESTION = ("check", "--feature", "pidfd_store")
"""What CRIU can be told to do of which nothing is left but the answers."""

_ASK_LIMIT_S = 5

_KEPT_NAME = "kernel-"


def is_wanted() -> bool:
    """Whether CRIU would ask again at each start: /run is no tmpfs, and small enough to be laid out anew."""
    try:
        return _file_system(FOLDER) != "tmpfs" and len(os.listdir(FOLDER)) <= _MOST_ENTRIES
    except OSError:
        return False


def _file_system(folder: str) -> str:
    """The type of the file system that a folder below / is on."""
    found = ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, source = line.partition(" - ")
            if fields.split()[4] in ("/", folder):
                found = source.split()[0]
    return found


def lay_out(answers: bytes, overlays: Sequence[str]) -> None:
    """In a mount namespace of our own: make /run a tmpfs with the same in it, and the answers.

    Not where the trial is to lay something over /run itself. Nothing is mounted if that cannot be done.
    """
    if FOLDER in overlays:
        return
    status = os.stat(FOLDER)
    entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(FOLDER)]
    real = os.open(FOLDER, os.O_PATH | os.O_DIRECTORY)
    try:
        kernel.mount("tmpfs", FOLDER, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0700")
        os.chown(FOLDER, status.st_uid, status.st_gid)
        os.chmod(FOLDER, status.st_mode & 0o7777)
        for name, is_folder in entries:
            if not name.startswith(_NAME):  # nor what a CRIU that was killed left half written
                _find_again(f"/proc/self/fd/{real}/{name}", f"{FOLDER}/{name}", is_folder)
    except OSError:
        kernel.unmount(FOLDER)
        return
    finally:
        os.close(real)
    if answers:
        with open(f"{FOLDER}/{_NAME}", "wb") as file:
            file.write(answers)


def answers_here() -> bytes:
    """What CRIU has found out about this kernel, as far as it is kept; empty where it is not."""
    return Answers().known if is_wanted() else _read_own()


def _read_own() -> bytes:
    """The file that CRIU itself keeps; empty where there is none, or a loan in its place."""
    try:
        with open(PATH, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as file:
            return file.read()
    except OSError:
        return b""


def lend(folder: Workspace, answers: bytes = b"") -> None:
    """Have a CRIU that works in our /run find these answers, or else those that are kept where CRIU keeps
    none. It has `folder` open, under the number that this has here.

    What it looks for becomes a link to what it has open itself: that leads any other CRIU nowhere, also one
    of a later kernel, should it stay. Two crclis at once take it from each other: a CRIU then asks again.
    """
    if answers := answers or (Answers().known if is_wanted() else b""):
        folder.write(_NAME, answers)
        forget_loans()
        with suppress(OSError):
            if own := _read_own():
                folder.write(_OWN_NAME, own)
                os.unlink(PATH)
            os.symlink(f"{_OWN_FILES}{folder.fd}/{_NAME}", PATH)


def take_back(folder: Workspace) -> None:
    """Undo `lend`: CRIU has looked."""
    forget_loans()
    folder.remove(_NAME)
    if _OWN_NAME in folder.names():
        with suppress(OSError), open(PATH, "xb", opener=_privately) as file:
            file.write(folder.read(_OWN_NAME))  # who reads half of it asks again
        folder.remove(_OWN_NAME)


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def forget_loans() -> None:
    """Have no link, also of a crcli that was killed. Never raises."""
    with suppress(OSError):
        if os.readlink(PATH).startswith(_OWN_FILES):
            os.unlink(PATH)


def ask() -> bytes:
    """Have a CRIU ask the kernel now, and return its answers; empty where that does not work.

    In a mount namespace of ours; a process of its own gets another, for that CRIU to leave them in.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _ask(writer)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as answers:
        found = answers.read()
    os.waitpid(child, 0)
    return found


def _ask(writer: int) -> None:
    signal.alarm(_ASK_LIMIT_S)
    kernel.unshare(kernel.CLONE_NEWNS)
    lay_out(b"", ())
    if criu := os.fork():
        os.waitpid(criu, 0)
        with open(f"{FOLDER}/{_NAME}", "rb") as file:
            os.write(writer, file.read())
        return
    signal.alarm(_ASK_LIMIT_S)  # it stays with what we become
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    command = [*criu_command(), *_QUESTION]
    os.execv(command[0], command)


def _find_again(real: str, path: str, is_folder: bool) -> None:
    if os.path.islink(real):
        os.symlink(os.readlink(real), path)
        return
    if is_folder:
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    kernel.mount(real, path, "", kernel.MS_BIND | kernel.MS_REC)


class Answers:
    """The answers that were kept on this host. Whatever goes wrong with them, CRIU only asks again."""

    def __init__(self) -> None:
        self._folder = state_folder()
        self._path = f"{self._folder}/{_KEPT_NAME}{_circumstances()}"
        self.known = self._read(self._path)

    def _read(self, path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError:
            return b""

    def learn(self, root: str) -> None:
        """Keep what the CRIU whose root folder is `root` has found out, if that is new."""
        self.keep(self._read(f"{root}{FOLDER}/{_NAME}"))

    def keep(self, found: bytes) -> None:
        """Keep what a CRIU has found out, if that is new."""
        if not found or found == self.known:
            return
        temporary = f"{self._folder}/.{_KEPT_NAME}{os.getpid()}"
        try:
            os.makedirs(self._folder, 0o700, exist_ok=True)
            with open(temporary, "wb", opener=_privately) as file:
                file.write(found)
            for name in os.listdir(self._folder):
                if name.startswith(_KEPT_NAME):  # of an earlier boot, or another CRIU
                    os.unlink(f"{self._folder}/{name}")
            os.rename(temporary, self._path)
        except OSError:
            pass
        self.known = found


def _circumstances() -> str:
    """What the answers hold for: this boot, this CRIU, what we are allowed to do."""
    digest = blake3()
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        digest.update(file.read())
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith((b"Cap", b"Seccomp", b"NoNewPrivs")):
                digest.update(line)
    for path in criu_command():
        if path.startswith("/"):
            status = os.stat(path)
            digest.update(f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest(8)

"""Trees that are killed or stopped, and of which CRIU sends no pages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crcli import kernel
from crcli.criu import kerndat, left_pages, messages
from crcli.criu.images import ImageFile
from crcli.criu.workspace import Workspace
from crcli.image.manifest import Manifest, load
from crcli.image.names import parse_image
from crcli.image.packs import ChunkReader
from crcli.memory.extents import PAGE, SpaceKind
from crcli.memory.pagemap import tracks_writes
from crcli.store.file import FileStore
from tests.support.crcli import Crcli, assert_goes_on, counter, reap, tree_of, wait_until
from tests.support.programs import spawn_python

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.skipif(not left_pages.is_possible([os.getpid()]), reason="CRIU cannot be told so"),
]
untracked = pytest.mark.skipif(tracks_writes(), reason="CRIU need not be told of this kernel")

ODD_MEMORY = """
    import ctypes, mmap, os, tempfile, threading, time
    libc = ctypes.CDLL(None, use_errno=True)
    PAGE, SIZE = 4096, 64 * 4096
    READ, WRITE, EXEC = 1, 2, 4

    def area(seed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd=-1, size=SIZE):
        found = mmap.mmap(fd, size, flags=flags)
        found[:] = b"".join(bytes([seed + page]) * PAGE for page in range(size // PAGE))
        return found

    def at(found):
        return ctypes.addressof(ctypes.c_char.from_buffer(found))

    def protect(found, how, first=0, pages=64):
        assert libc.mprotect(ctypes.c_void_p(at(found) + first * PAGE), pages * PAGE, how) == 0

    file = tempfile.TemporaryFile()
    file.write(bytes(SIZE))
    file.flush()
    plain, locked, hidden, written = area(1), area(2), area(3), area(4)
    code, copied, shared, mixed, dropped = area(5), area(6, mmap.MAP_PRIVATE, file.fileno()), area(
        7, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), area(8), area(9)
    libc.mlock(ctypes.c_void_p(at(locked)), SIZE)
    protect(hidden, 0)
    protect(written, WRITE)
    protect(code, EXEC)
    protect(mixed, READ, 8, 8)
    protect(mixed, 0, 32, 8)
    dropped.madvise(mmap.MADV_DONTNEED, 16 * PAGE, 16 * PAGE)
    threads = [threading.Thread(target=lambda: threading.Event().wait(), daemon=True) for _ in range(5)]
    for one in threads:
        one.start()
    child = os.fork()
    if child == 0:
        plain[5 * PAGE : 6 * PAGE] = b"c" * PAGE
        while True:
            time.sleep(1000)
    everything = (plain, locked, hidden, written, code, copied, shared, mixed, dropped)

    def digest():
        import hashlib
        for one in (hidden, code, written):
            protect(one, READ)
        protect(mixed, READ, 32, 8)
        return hashlib.sha256(b"".join(bytes(one) for one in everything)).hexdigest()

    import signal, hashlib
    print("ready", flush=True)
    while True:
        signal.sigwait({signal.SIGUSR1})
        print(digest(), flush=True)
"""
ODD_MEMORY = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n" + "\n".join(
    line.removeprefix("    ") for line in ODD_MEMORY.splitlines()
)


COUNTING = """
from crcli.memory.intake import Intake
take_left = Intake.take_left
def counting(self, lazy_of):
    print(sum(run.end - run.start for runs in self._left.values() for run in runs), file=sys.stderr)
    take_left(self, lazy_of)
Intake.take_left = counting
"""

TAKING_AWAY = """
from crcli.criu import kerndat
lend = kerndat.lend
def lend_in_vain(*given):
    lend(*given)
    kerndat.forget_loans()  # as another crcli does
kerndat.lend = lend_in_vain
"""


def dump_with(code: str, crcli: Crcli, pid: int) -> tuple[dict[str, Any], str]:
    """Dump a tree by a crcli that runs this before; return its report, and what it said."""
    program = f"import sys\nfrom crcli.__main__ import main\n{code}\nsys.exit(main())"
    tree = tree_of(pid)
    done = subprocess.run(
        [sys.executable, "-c", program, "dump", str(pid), "--store", crcli.store, "--json"],
        env=crcli.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    reap(tree)
    return json.loads(done.stdout), done.stderr


def image_of(crcli: Crcli, image: str) -> tuple[Manifest, ChunkReader]:
    """An image as it is stored."""
    store = FileStore(Path(crcli.folder, "store"))
    manifest = load(store, parse_image(image)[1])
    return manifest, ChunkReader(store, manifest.packs, manifest.chunks)


def was_left(crcli: Crcli, image: str) -> bool:
    """Whether CRIU was told of an earlier dump: it then notes when it made this one."""
    manifest, chunks = image_of(crcli, image)
    (file,) = (file for file in manifest.skeleton if file.name == "inventory.img")
    data = chunks.blob(file.chunks)
    return bool(ImageFile.parse(data, messages.inventory_entry).entries[0].HasField("dump_uptime"))


def lazy_pages(manifest: Manifest) -> dict[tuple[int, int], bool]:
    """Whether each page of each process is lazy."""
    return {
        (space.number, page): extent.lazy
        for space, extents in manifest.spaces.items()
        if space.kind == SpaceKind.PROCESS
        for extent in extents
        for page in range(extent.start, extent.end)
    }


def test_odd_memory_is_what_it_was_and_as_lazy_as_criu_has_it(crcli: Crcli) -> None:
    """Locked, hidden, write-only, executable, a file's, shared, given back, stacks of threads, a child's: the
    same pages with the same contents as when CRIU sends them, and each lazy exactly if CRIU says so."""
    with spawn_python(ODD_MEMORY) as program:
        sent = crcli.dump(program.pid, "--leave-running")["image"]
        left = crcli.dump(program.pid)["image"]
        assert (was_left(crcli, sent), was_left(crcli, left)) == (False, True)
        by_criu, by_us = lazy_pages(image_of(crcli, sent)[0]), lazy_pages(image_of(crcli, left)[0])
        assert by_us.keys() == by_criu.keys()
        assert {page: lazy for page, lazy in by_us.items() if lazy != by_criu[page]} == {}
        assert 0 < sum(by_us.values()) < len(by_us)
        digests = []
        for image in (sent, left):
            restored = crcli.restore(image, "--pid-namespace", "new")
            lines = len(program.output.splitlines())
            os.kill(restored["host_pid"], signal.SIGUSR1)
            wait_until(lambda lines=lines: len(program.output.splitlines()) > lines, "it does not answer")
            digests.append(program.output.splitlines()[-1])
        assert digests[0] == digests[1]


def test_criu_sends_next_to_nothing(crcli: Crcli) -> None:
    """Of the private memory of a tree that is killed almost all is left there."""
    with spawn_python(counter(kilobytes=32 << 10)) as program:
        report, said = dump_with(COUNTING, crcli, program.pid)
        left = int(said.split()[-1])
        assert 0.9 * report["memory_bytes"] < left * PAGE <= report["memory_bytes"]
        crcli.restore(report["image"])
        assert_goes_on(program)


@pytest.mark.parametrize("outcome", [(), ("--leave-stopped",)])
def test_the_first_dump_of_a_host_leaves_pages_already(crcli: Crcli, outcome: tuple[str, ...]) -> None:
    """Whoever is asked about the kernel for the trial is waited for."""
    with spawn_python(counter(kilobytes=8 << 10)) as program:
        image = crcli.dump(program.pid, *outcome)["image"]
        assert was_left(crcli, image)
        if not outcome:
            crcli.restore(image)
            assert_goes_on(program)


@untracked
def test_where_another_takes_away_what_criu_is_told_the_dump_is_made_again(crcli: Crcli) -> None:
    """CRIU finds out for itself that this kernel tracks no writes, and refuses before it freezes anything."""
    with spawn_python(counter(kilobytes=8 << 10)) as program:
        report, _ = dump_with(TAKING_AWAY, crcli, program.pid)
        assert "pages-again" in [finding["name"] for finding in report["findings"]]
        assert not was_left(crcli, report["image"])
        crcli.restore(report["image"])
        assert_goes_on(program)


def test_a_tmpfs_at_run_has_its_own_answers_again() -> None:
    """What CRIU itself keeps there comes back once it has looked, and no other finds what was lent."""
    child = os.fork()
    if child == 0:
        os._exit(0 if _has_its_own_again() else 1)
    assert os.waitpid(child, 0)[1] == 0


def _has_its_own_again() -> bool:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/run", "tmpfs")
    path = Path(kerndat.PATH)
    path.write_bytes(b"its own")
    with Workspace.create() as folder:
        kerndat.lend(folder, b"lent")
        is_lent = Path(f"/proc/self/fd/{folder.fd}/criu.kdat").read_bytes() == path.read_bytes() == b"lent"
        kerndat.take_back(folder)
        kerndat.take_back(folder)
        return is_lent and os.listdir("/run") == ["criu.kdat"] and path.read_bytes() == b"its own"

"""Programs that read and write with libaio: what they have begun ends without them, frozen or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.crcli import Crcli, assert_goes_on, install_plugin
from tests.support.programs import spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

BEGIN = """
import ctypes, itertools, mmap, os, struct, time

libc = ctypes.CDLL(None, use_errno=True)
SETUP, SUBMIT, GETEVENTS = (0, 2, 4) if os.uname().machine == "aarch64" else (206, 209, 208)
context = ctypes.c_ulong()
if libc.syscall(SETUP, 64, ctypes.byref(context)):
    raise SystemExit("no aio here")

def begin(operation, fd, buffer, size, at):
    request = struct.pack("=QIIHhIQQqQII", 0, 0, 0, operation, 0, fd, buffer, size, at, 0, 0, 0)
    kept = ctypes.create_string_buffer(request, len(request))
    assert libc.syscall(SUBMIT, context, 1, (ctypes.c_void_p * 1)(ctypes.addressof(kept))) == 1, "submit"
"""

READS = (
    BEGIN
    + """
COUNT, SIZE = 16, 4 << 20
fd = os.open(PATH, os.O_RDONLY | os.O_DIRECT)
pages = mmap.mmap(-1, COUNT * SIZE)
first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
events = (ctypes.c_char * 32 * COUNT)()
for number in itertools.count():
    print(number, "0" * 16)
    if not number:
        print("ready")
    for one in range(COUNT):
        begin(0, fd, first + one * SIZE, SIZE, one * SIZE)
    left = COUNT
    while left:
        got = libc.syscall(GETEVENTS, context, 1, left, events, None)
        assert got > 0 or ctypes.get_errno() == 4, "getevents"
        left -= max(0, got)
    assert all(pages[one * SIZE] == one and pages[(one + 1) * SIZE - 1] == one for one in range(COUNT))
"""
)

WAITS = (
    BEGIN
    + """
for path in PATHS:
    begin(5, os.open(path, os.O_RDONLY | os.O_NONBLOCK), 1, 0, 0)  # until it can be read
for number in itertools.count():
    print(number, "0" * 16)
    if not number:
        print("ready")
    time.sleep(0.01)
"""
)


def test_reads_that_are_under_way_are_not_lost(crcli: Crcli, tmp_path: Path) -> None:
    """A program that waits for reads gets all of them after a restore, and what was read."""
    path = tmp_path / "data"
    path.write_bytes(b"".join(bytes([one]) * (4 << 20) for one in range(16)))
    with spawn_python(READS.replace("PATH", repr(str(path)))) as program:
        assert_goes_on(program)
        pid = program.pid
        for _ in range(4):
            pid = crcli.move(pid)["host_pid"]
            assert_goes_on(program)


@pytest.mark.parametrize("ends", [1, 2])
def test_what_ends_too_late(crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int) -> None:
    """What does not end while it is waited for, but while the memory is taken, may have changed it: the tree
    is dumped again; and if that happens again, there is no image, and it runs on."""
    fifos = [str(tmp_path / f"fifo-{number}") for number in range(ends)]
    for fifo in fifos:
        os.mkfifo(fifo)
    code = f"""
        from crcli.plugins import hookimpl

        left = {fifos!r}

        @hookimpl
        def crcli_dump_frozen(target):
            if left:
                open(left.pop(), "wb").write(b"x")
        """
    install_plugin(tmp_path / "site", "ender", code, monkeypatch)
    for options in (["--leave-running"], []):
        with spawn_python(WAITS.replace("PATHS", repr(fifos))) as program:
            if ends == 1:
                report = crcli.dump(program.pid, *options)
                assert "aio-again" in {finding["name"] for finding in report["findings"]}
                if not options:
                    crcli.restore(report["image"])
            else:
                error = crcli.dump(program.pid, *options, code=11)["error"]
                assert "libaio" in error["message"] and error["state"] == "running"
            assert_goes_on(program)
    images = crcli.run("ls", "--store", crcli.store, "--json").json["images"]
    assert len(images) == (2 if ends == 1 else 0)

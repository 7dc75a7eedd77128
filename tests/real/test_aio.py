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
fifo = os.open(PATH, os.O_RDONLY | os.O_NONBLOCK)
begin(5, fifo, 1, 0, 0)  # until it can be read
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


def test_what_ends_too_late_is_no_image(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not end while it is waited for, but while the memory is taken, may have changed it: there is
    no image, and the program runs on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = f"""
        from crcli.plugins import hookimpl

        @hookimpl
        def crcli_dump_frozen(target):
            open({str(fifo)!r}, "wb").write(b"x")
        """
    install_plugin(tmp_path / "site", "ender", code, monkeypatch)
    for how in ((), ("--leave-running",)):
        with spawn_python(WAITS.replace("PATH", repr(str(fifo)))) as program:
            error = crcli.dump(program.pid, *how, code=11)["error"]
            assert "libaio" in error["message"] and error["state"] == "running"
            assert_goes_on(program)
    assert crcli.run("ls", "--store", crcli.store, "--json").json["images"] == []

"""Event loops of libuv, each of which has a ring of io_uring that cannot be saved: they go on without."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from crcli.criu.rings import leave_rings
from crcli.process.files import open_files
from crcli.process.rings import event_rings
from tests.support.crcli import Crcli, launched, wait_until
from tests.support.frozen import frozen
from tests.support.programs import Program, spawn_python

pytest.importorskip("uvloop")

COUNTER = """
    import asyncio, uvloop
    async def main():
        for number in range(1 << 40):
            print(number, flush=True)
            await asyncio.sleep(0.01)
    print("ready", flush=True)
    uvloop.run(main())
    """

SERVER = """
    import asyncio, uvloop
    async def answer(reader, writer):
        writer.write(await reader.readline())
        writer.close()
    async def ask(port):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"word\\n")
            answer = await reader.readline()
            writer.close()
        except OSError:  # nobody had accepted it when the image was taken
            return False
        return answer == b"word\\n"
    async def spin():
        while True:
            await asyncio.sleep(0)
    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        spinning = asyncio.ensure_future(spin())
        for number in range(1 << 40):
            while not await ask(port):
                pass
            child = await asyncio.create_subprocess_exec("true")
            assert await child.wait() == 0
            print(number, flush=True)
    print("ready", flush=True)
    uvloop.run(main())
    """

LOOPS = """
    import asyncio, threading, uvloop
    never = uvloop.new_event_loop()
    def turn():
        uvloop.new_event_loop().run_until_complete(forever())
    async def forever():
        while True:
            await asyncio.sleep(0.01)
    for _ in range(2):
        threading.Thread(target=turn, daemon=True).start()
    print("ready", flush=True)
    number = 0
    while True:
        if number % 100000 == 0:
            print(number // 100000, flush=True)
        number += 1
    """

NOTIFIED = """
    import asyncio, uvloop
    from crcli import notify
    async def main():
        notify.on_checkpoint(lambda: print("told", flush=True))
        for number in range(1 << 40):
            print(number, flush=True)
            await asyncio.sleep(0.01)
    print("ready", flush=True)
    uvloop.run(main())
    """

FILTERED = """
    import asyncio, ctypes, struct, uvloop
    def without_munmap():
        steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 11), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
    async def main():
        without_munmap()
        for number in range(1 << 40):
            print(number, flush=True)
            await asyncio.sleep(0.01)
    print("ready", flush=True)
    uvloop.run(main())
    """


def numbers(program: Program) -> list[int]:
    """What a program has printed so far."""
    return [int(line) for line in program.output.splitlines() if line.isdigit()]


def assert_goes_on(program: Program) -> None:
    """It prints more numbers, each once."""
    before = len(numbers(program))
    wait_until(lambda: len(numbers(program)) > before + 3, "it stands still")
    got = numbers(program)
    assert got == list(range(len(got)))


def rings_of(program: Program) -> list[str]:
    """The descriptors of a program that are rings."""
    found = []
    for path in Path(f"/proc/{program.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found += [path.name] if "io_uring" in str(path.readlink()) else []
    return found


def needs_rings(program: Program, count: int = 1) -> None:
    """Skip the test where the program was not given rings."""
    wait_until(lambda: numbers(program) != [], "it does not begin")
    if not rings_of(program):
        pytest.skip("no io_uring is to be had here")
    assert len(rings_of(program)) == count


def names_in(report: dict[str, object]) -> set[str]:
    """The names of its findings."""
    return {finding["name"] for finding in report["findings"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "rings"), [(COUNTER, 1), (SERVER, 1), (LOOPS, 3)], ids=["idle", "busy", "many"]
)
def test_a_program_with_event_loops_goes_on_without_rings(crcli: Crcli, code: str, rings: int) -> None:
    """Left running it makes do without, and what is said of that is a note; dumped, it comes back."""
    with spawn_python(code) as program:
        needs_rings(program, rings)
        report = crcli.dump(program.pid, "--leave-running")
        assert "io-uring-left" in names_in(report)
        assert rings_of(program) == []
        assert_goes_on(program)
        report = crcli.dump(program.pid)
        assert "io-uring-left" not in names_in(report)
        crcli.restore(report["image"])
        assert_goes_on(program)


def test_nothing_is_done_to_a_loop_by_looking(crcli: Crcli) -> None:
    """check and the dry run say what would be done."""
    with spawn_python(COUNTER) as program:
        needs_rings(program)
        for command in (("check",), ("dump", "--dry-run")):
            options = ("--store", crcli.store, "--json")
            report = crcli.run(command[0], str(program.pid), *command[1:], *options).json
            assert "io-uring-left" in names_in(report)
        assert len(rings_of(program)) == 1


def is_stopped_while_it_waits(pid: int) -> bool:
    """Stop a program by job control; let it go on if it was at work: it may be at its ring for good then."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(pid).status() == "stopped", "it runs on")
    waits = Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("232", "281", "22", "441")
    if not waits:
        os.kill(pid, signal.SIGCONT)
    return waits


def test_a_program_that_job_control_has_stopped_stays_stopped(crcli: Crcli) -> None:
    """It makes do without its ring all the same, and goes on when it is told to."""
    with spawn_python(COUNTER) as program:
        needs_rings(program)
        wait_until(lambda: is_stopped_while_it_waits(program.pid), "it never waits for events")
        crcli.dump(program.pid, "--leave-running")
        assert rings_of(program) == []
        assert psutil.Process(program.pid).status() == "stopped"
        os.kill(program.pid, signal.SIGCONT)
        assert_goes_on(program)


def test_what_was_found_is_told_though_it_is_looked_again(crcli: Crcli) -> None:
    """It is looked at once more when its loops have left their rings, and when its callbacks have run."""
    with spawn_python(NOTIFIED) as program:
        needs_rings(program)
        findings = crcli.dump(program.pid, "--leave-running", "--pre-copy", "auto")["findings"]
        assert "told" in program.output.splitlines()
        assert [one["name"] for one in findings].count("io-uring-left") == 1
        again = crcli.dump(program.pid, "--leave-running", "--pre-copy", "auto")["findings"]
        assert names_in({"findings": findings}) == {*names_in({"findings": again}), "io-uring-left"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="its filter names a system call by number")
def test_a_program_whose_seccomp_filter_kills_it_for_a_call_lives(crcli: Crcli) -> None:
    """What it is made to call is not its own doing."""
    with spawn_python(FILTERED) as program:
        needs_rings(program)
        crcli.dump(program.pid, "--leave-running")
        assert rings_of(program) == []
        assert_goes_on(program)


def test_a_frozen_program_is_left_as_it_is(crcli: Crcli) -> None:
    """It can be made to do nothing, which is said; thawed it goes on, and can be dumped."""
    with spawn_python(COUNTER) as program:
        needs_rings(program)
        with frozen(program):
            report = crcli.dump(program.pid, code=10)
            assert "thaw" in report["error"]["hint"]
            assert len(rings_of(program)) == 1
        assert_goes_on(program)
        crcli.dump(program.pid)


def test_who_is_interrupted_leaves_nobody_traced() -> None:
    """A signal ends the tries, and it is waited until they have ended."""

    def interrupt(_number: int, _frame: object) -> None:
        raise InterruptedError

    with spawn_python(COUNTER) as program:
        needs_rings(program)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with frozen(program):
                rings = event_rings(open_files(program.pid))
                assert len(rings) == 1
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                with pytest.raises(InterruptedError):
                    leave_rings(rings, 600)
                assert "TracerPid:\t0" in Path(f"/proc/{program.pid}/status").read_text()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert_goes_on(program)


def test_a_loop_is_known_while_it_is_at_work_in_its_ring() -> None:
    """The kernel says little of a ring then, which is not taken for its nature."""
    with spawn_python(SERVER) as program:
        needs_rings(program)
        for _ in range(400):
            assert len(event_rings(open_files(program.pid))) == 1


def test_node_is_dumped_with_its_loops(crcli: Crcli, tmp_path: Path) -> None:
    """The loops of Node itself: the program's, the one that its threads share, and one that never runs."""
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    (tmp_path / "count.js").write_text("let n = 0; setInterval(() => console.log(n++), 10)")
    with launched([node, str(tmp_path / "count.js")], tmp_path) as program:
        wait_until(lambda: numbers(program) != [], "it does not begin")
        crcli.move(program.pid)
        assert_goes_on(program)

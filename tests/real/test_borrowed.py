"""Threads that run CRIU's code when CRIU is killed go on as if nothing had been.

CRIU cannot be held in such a moment, so a tracer of ours stands for it: it borrows a thread as compel does,
in the same steps and with the same notes in its memory, stops after one of them, and is killed. The standby's
watch is the real one. That it knows what the real CRIU does `test_nothing_lost` shows, at random moments.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from crcli import kernel
from crcli.criu import compel
from crcli.criu.puppet import MACHINES
from crcli.criu.standby import AfterDeath, Standby
from tests.support.crcli import wait_until
from tests.support.faults import Attempt, network_of_our_own
from tests.support.faults import victim as victim_tree
from tests.support.programs import Program, spawn_python

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the registers of x86-64 only"),
]

PROGRAM = """
    import ctypes, mmap, os, signal, struct, threading, time
    libc = ctypes.CDLL(None, use_errno=True)
    board = mmap.mmap(os.open({board!r}, os.O_RDWR), 4096)
    def count(slot):
        number = 0
        while True:
            number += 1
            assert struct.unpack("d", struct.pack("d", number / 8))[0] * 8 == number
            board[slot : slot + 8] = number.to_bytes(8, "little")
            time.sleep(0.001)
    memory = os.memfd_create("CRIUMFD")
    os.write(memory, bytes.fromhex({routine!r}).ljust(4096, b"\\0"))
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED, memory, 0)
    os.close(memory)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    threading.Thread(target=count, args=(8,), daemon=True).start()
    threading.Thread(target=signal.pause, daemon=True).start()
    print("ready")
    count(0)
    """

ROUTINE = "0f57c0" + "660f76c0" + "31c0" + "7e0c" + "4889c4" + "48c7c00f000000" + "0f05" + "cc"
"""Clears and sets xmm0, returns 0: the breakpoint."""
CALL = bytes.fromhex("0f05cccccccccccc")
GETPID, MEMFD_CREATE = 39, 319


class Borrower:
    """What stands for CRIU: traces all threads of a process, and has one of them run code."""

    def __init__(self, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid
        code = list(compel.code(pid))
        self.text = next(start for start, _, is_criu in code if not is_criu)
        self.routine = next(start for start, _, is_criu in code if is_criu)
        for name in os.listdir(f"/proc/{pid}/task"):
            kernel.seize(int(name))
            kernel.interrupt(int(name))
            kernel.wait_for_thread(int(name))
        self.own = kernel.registers(tid, kernel.GENERAL)
        self.blocked = kernel.blocked_signals(tid)
        # struct parasite_thread_ctl
        self.notes = struct.pack("<Q56xQ", tid, self.blocked) + self.own + struct.pack("<H6x48x", 10)
        self.notes = self.notes.ljust(384, b"\0") + kernel.registers(tid, kernel.XSTATE)

    def write_call(self) -> None:
        compel.write_memory(self.pid, self.text, CALL)

    def block(self) -> None:
        kernel.block_signals(self.tid, compel.ALL_BUT_TRAP)

    def point(self, call: int = GETPID, argument: int = 0) -> None:
        """Set the registers to the code that is to run."""
        machine = MACHINES["x86_64"]
        values = list(struct.unpack("27Q", self.own))
        values[machine.instruction_pointer] = self.text if self.tid == self.pid else self.routine
        values[machine.number], values[machine.original_number or 0] = call, (1 << 64) - 1
        values[machine.arguments[0]], values[machine.arguments[1]] = argument, 0
        kernel.set_registers(self.tid, kernel.GENERAL, struct.pack("27Q", *values))

    def open_memory(self) -> None:
        """Have a file like CRIU's made."""
        name = self.text + len(CALL)
        compel.write_memory(self.pid, name, b"CRIUMFD\0")
        self.point(MEMFD_CREATE, name)

    def run(self) -> None:
        """Let it run, and see it stop at the breakpoint."""
        kernel.go_on(self.tid, 0)
        assert kernel.wait_for_thread(self.tid) == (signal.SIGTRAP, True)

    def run_unseen(self) -> None:
        """Let it run, and do not look."""
        kernel.go_on(self.tid, 0)


Steps = tuple[Callable[[Borrower], None], ...]
STEPS: Steps = (Borrower.write_call, Borrower.block, Borrower.point, Borrower.run)


class Victim:
    """A program with two threads that count, and what it looks like."""

    def __init__(self, program: Program, board: Path) -> None:
        self.program = program
        self.pid = program.pid
        self.threads = sorted(map(int, os.listdir(f"/proc/{self.pid}/task")))
        self._board = board

    def counts(self) -> tuple[int, int]:
        """How far its threads have come."""
        first, second = struct.unpack_from("QQ", self._board.read_bytes())
        return first, second

    def looks(self) -> tuple[list[str], bytes, list[str]]:
        """Blocked signals, the beginning of the program text, and open files."""
        blocked = [_line(f"/proc/{self.pid}/task/{tid}/status", "SigBlk") for tid in self.threads]
        text = compel.Text.of(self.pid)
        assert text is not None, "CRIU's code stands in the program text"
        folder = f"/proc/{self.pid}/fd"
        return blocked, text.content, sorted(os.readlink(f"{folder}/{name}") for name in os.listdir(folder))

    def assert_goes_on(self) -> None:
        """Assert that both threads count on, and find their numbers right."""
        before = self.counts()
        wait_until(
            lambda: all(now > then + 5 for now, then in zip(self.counts(), before, strict=True)), "stands"
        )
        assert "Error" not in self.program.output


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A victim that counts."""
    board = tmp_path / "board"
    board.write_bytes(bytes(4096))
    with spawn_python(PROGRAM.format(board=str(board), routine=ROUTINE)) as program:
        found = Victim(program, board)
        found.assert_goes_on()
        yield found


def killed_after(
    steps: Steps,
    victim: Victim,
    tid: int,
    until: Callable[[], bool],
    folder: Path,
    kill: Callable[[Standby, int], object] = lambda _, child: os.kill(child, signal.SIGKILL),
) -> AfterDeath:
    """Kill a borrower of this thread after these steps, once `until` holds; return what the standby says."""
    images = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    begin, done = os.pipe(), os.pipe()
    try:
        with Standby(victim.pid, images) as standby:
            child = os.fork()
            if child == 0:
                try:
                    os.read(begin[0], 1)
                    borrower = Borrower(victim.pid, tid)
                    for step in steps:
                        step(borrower)
                    os.write(done[1], b"!")
                    signal.pause()
                finally:
                    os._exit(1)
            standby.watch(child, lambda: None)
            wait_until(lambda: _line(f"/proc/{child}/status", "TracerPid") != "0", "the standby watches")
            os.write(begin[1], b"!")
            assert os.read(done[0], 1)
            wait_until(until, "the thread does not get there")
            kill(standby, child)
            report = standby.wait()
            os.waitpid(child, 0)
            assert report is not None
            return report
    finally:
        for fd in (images, *begin, *done):
            os.close(fd)


@pytest.mark.parametrize("number", range(len(STEPS) + 1), ids=["seized", "written", "blocked", "set", "run"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["first thread", "counting thread", "waiting thread"])
def test_a_borrowed_thread_is_given_back(which: int, number: int, victim: Victim, tmp_path: Path) -> None:
    """After each step of borrowing: the thread goes on with all that is its own, and the process is whole."""
    before, waiting = victim.looks(), registers_of(victim.threads[2])
    report = killed_after(STEPS[:number], victim, victim.threads[which], lambda: True, tmp_path)
    assert not report.lost and [one.pid for one in report.held] == [victim.pid]
    victim.assert_goes_on()
    assert victim.looks() == before
    assert registers_of(victim.threads[2]) == waiting


DISTRACTIONS: dict[int, Callable[[Standby, int], object]] = {
    signal.SIGURG: lambda _, child: os.kill(child, signal.SIGURG),
    signal.SIGTRAP | 0x80: lambda standby, child: standby.poke(child, [(child, [(0, 0)])]),
}
"""What has the standby deal with a stop of CRIU's, by the stop's signal: another signal, a call for us."""


@pytest.mark.parametrize("number", DISTRACTIONS, ids=["a signal", "a call"])
def test_a_death_while_another_stop_is_dealt_with_is_seen(
    number: int, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU is killed when the standby has seen it stop for something else, and not let it go on yet."""
    wait_for_stop = kernel.wait_for_stop

    def and_kill(pid: int) -> kernel.Stop | None:
        stop = wait_for_stop(pid)
        if stop is not None and stop.signal == number:
            os.kill(pid, signal.SIGKILL)
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT) is None:
                pass
        return stop

    monkeypatch.setattr(kernel, "wait_for_stop", and_kill)
    before = victim.looks()
    tid = victim.threads[1]
    report = killed_after(STEPS, victim, tid, lambda: True, tmp_path, DISTRACTIONS[number])
    assert not report.lost
    victim.assert_goes_on()
    assert victim.looks() == before


def test_what_the_real_criu_has_borrowed_is_known(tmp_path: Path) -> None:
    """CRIU, stopped while its code is in a process: its notes of each thread, and its routine, are found."""
    with network_of_our_own(), victim_tree(tmp_path / "victim") as tree:
        for number in range(10):
            name = f"{tree.folder.name}-{number}"
            arguments = ("dump", str(tree.pid), "--store", f"file://{tmp_path}/store", "--name", name)
            attempt = Attempt(tmp_path, (*arguments, "--leave-running"))
            attempt.wait_for(lambda: _has_criu_code(tree.pid))
            criu = attempt.criu()
            if not criu:  # it is over, and 0 would be all of us
                attempt.end()
                continue
            os.kill(criu, signal.SIGSTOP)
            wait_until(partial(_is_stopped, criu), "CRIU does not stop")
            try:
                # Else CRIU had left it meanwhile, or had not come to all of its threads.
                found = _has_criu_code(tree.pid) and all(notes_of_threads(criu, tree.pid).values())
                if found:
                    assert_is_known(criu, tree.pid)
            finally:
                os.kill(criu, signal.SIGCONT)
                attempt.end()
            if found:
                return
        pytest.fail("CRIU's code, and its notes of all threads, were never seen")


def notes_of_threads(criu: int, pid: int) -> dict[int, list[compel.Context]]:
    """CRIU's notes of each thread of this process."""
    contexts = compel.contexts(criu)
    threads = map(int, os.listdir(f"/proc/{pid}/task"))
    return {tid: [one for one in contexts if one.is_of(tid, one.registers)] for tid in threads}


def assert_is_known(criu: int, pid: int) -> None:
    """Assert that CRIU's notes of all threads of this process are right, and the end of its routine in it."""
    machine = MACHINES["x86_64"]
    for tid, mine in notes_of_threads(criu, pid).items():
        words = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
        blocked = int(_line(f"/proc/{pid}/task/{tid}/status", "SigBlk"), 16)
        if blocked != compel.ALL_BUT_TRAP:  # it stands where it was
            stack, place = (int(word, 16) for word in words[-2:])
            registers = [one.registers for one in mine]
            assert any(one[machine.stack_pointer] == stack for one in registers)
            assert any(abs(one[machine.instruction_pointer] - place) <= 2 for one in registers)
    start, end = next((start, end) for start, end, is_criu in compel.code(pid) if is_criu)
    code = Path(f"/proc/{pid}/map_files/{start:x}-{end:x}").read_bytes()
    assert code.find(compel._TAIL) in range(compel._HEAD_BYTES), "the end of CRIU's routine is another"


def _is_stopped(pid: int) -> bool:
    return _line(f"/proc/{pid}/status", "State") in "Tt"


def _has_criu_code(pid: int) -> bool:
    return any(is_criu for _, _, is_criu in compel.code(pid))


def registers_of(tid: int) -> tuple[bytes, bytes]:
    """All registers of a thread."""
    kernel.seize(tid)
    try:
        kernel.interrupt(tid)
        kernel.wait_for_thread(tid)
        return kernel.registers(tid, kernel.GENERAL), kernel.registers(tid, kernel.XSTATE)
    finally:
        kernel.let_go(tid)


def test_what_criu_had_a_process_open_is_closed(victim: Victim, tmp_path: Path) -> None:
    """CRIU killed between its memfd_create and its close: the process closes it, and goes on."""
    before = victim.looks()
    steps = (Borrower.write_call, Borrower.block, Borrower.open_memory, Borrower.run)
    report = killed_after(steps, victim, victim.pid, lambda: True, tmp_path)
    assert not report.lost
    victim.assert_goes_on()
    assert victim.looks() == before


def test_a_thread_whose_breakpoint_nobody_saw_is_named_as_lost(victim: Victim, tmp_path: Path) -> None:
    """The one moment in which nobody can help: the process dies of SIGTRAP, and the standby has said so."""
    steps = (Borrower.block, Borrower.point, Borrower.run_unseen)

    def is_there() -> bool:
        words = Path(f"/proc/{victim.pid}/task/{victim.threads[1]}/stat").read_text().split()
        return words[-1] == str(int(signal.SIGTRAP))

    report = killed_after(steps, victim, victim.threads[1], is_there, tmp_path)
    assert [one.pid for one in report.lost] == [victim.pid]
    assert victim.program.process.wait(10) == -signal.SIGTRAP


def _line(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))

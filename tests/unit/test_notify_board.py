"""crcli.notify: the module that a program imports, and crcli's careful side of it, in two processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crcli import notify as contract
from crcli.process import notify
from crcli.process.notify import Boards, find

ROOT = Path(__file__).parents[2]
AGENT = """
    from crcli import notify

    def say(word):
        return lambda: print(word, flush=True)

    notify.on_checkpoint(say("checkpoint"))
    notify.on_resume(say("resume"))
    notify.on_restore(say("restore"))
    """
WAITING = "\nimport os\nos.write(1, b'ready\\n')\nimport time\ntime.sleep(60)\n"


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program of this text, once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """The next line of a program."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def boards_of(*pids: int) -> Iterator[Boards]:
    """The boards of processes."""
    with Boards(find(pids)) as boards:
        yield boards


def agent(more: str = "") -> str:
    """The text of a program that prints what it is told."""
    return textwrap.dedent(AGENT) + textwrap.dedent(more) + WAITING


# --- the program's side ------------------------------------------------------------------------------------


def test_the_module_is_light_and_stands_alone(tmp_path: Path) -> None:
    """Copied beside a program, the file works without crcli, and imports only small standard modules."""
    shutil.copy(ROOT / "crcli" / "notify.py", tmp_path / "notify.py")
    code = """
        import sys
        before = set(sys.modules)
        import notify
        new = set(sys.modules) - before - {"notify"}
        assert {name.partition(".")[0] for name in new} <= set(sys.stdlib_module_names), new
        assert not new & {"asyncio", "typing", "ctypes", "traceback", "inspect"}, new
        assert notify.wait_restored(0) is False
        print("ready", flush=True)
        assert notify.wait_restored(60) is True
        print("restored", flush=True)
        """
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert said(process) == "ready"
    with boards_of(process.pid) as boards:
        boards.restored()
    assert said(process) == "restored"
    assert process.wait(10) == 0


def test_importing_it_does_nothing() -> None:
    """A program that only imports the module has no thread and no descriptor more."""
    code = """
        import os, threading
        before = os.listdir("/proc/self/fd")
        from crcli import notify
        assert os.listdir("/proc/self/fd") == before and threading.active_count() == 1
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_callbacks_are_called_in_their_order() -> None:
    """A dump that goes on is a checkpoint and a resume; a restore is told once, without a resume."""
    with running(agent("notify.on_checkpoint(say('second'))")) as process, boards_of(process.pid) as boards:
        assert boards.want_word
        assert boards.checkpoint(10) == []
        boards.resumed()
        assert [said(process) for _ in range(3)] == ["checkpoint", "second", "resume"]
        assert boards.checkpoint(10) == []
        boards.restored()
        assert [said(process) for _ in range(3)] == ["checkpoint", "second", "restore"]
        boards.restored()
        assert said(process) == "restore"


def test_leaving_the_boards_ends_what_was_announced() -> None:
    """Whatever ends crcli's work, a program that was told of a dump hears that it is over."""
    with running(agent()) as process:
        with pytest.raises(RuntimeError), boards_of(process.pid) as boards:
            boards.checkpoint(10)
            raise RuntimeError
        assert [said(process), said(process)] == ["checkpoint", "resume"]


def test_a_checkpoint_of_which_nothing_more_is_heard_is_over() -> None:
    """Where crcli is killed after it announced a dump, the program resumes by itself."""
    code = agent().replace("def say", "notify.SILENCE_S = 0.2\ndef say", 1)
    with running(code) as process:
        boards = Boards(find([process.pid]))
        boards.checkpoint(10)
        assert [said(process), said(process)] == ["checkpoint", "resume"]
        boards.resumed()
        boards.restored()
        assert said(process) == "restore"  # and not resumed again
        boards.__exit__(None, None, None)


def test_a_callback_that_fails_stops_no_other() -> None:
    """What a callback raises goes to stderr; the next one is called, and crcli need not wait."""
    more = """
        def fails():
            raise ValueError("mine")
        notify.on_checkpoint(fails)
        notify.on_checkpoint(say("next"))
        """
    code = "import sys; sys.stderr = sys.stdout\n" + agent(more)
    with running(code) as process, boards_of(process.pid) as boards:
        assert boards.checkpoint(10) == []
        assert said(process) == "checkpoint"
        printed = ""
        while "ValueError: mine" not in printed:
            printed = said(process)
        assert said(process) == "next"


def test_a_forked_child_has_a_board_of_its_own() -> None:
    """A child registers its own callbacks: it is told by itself, and its parent's are not called in it."""
    more = """
        import os, time
        child = os.fork()
        if child == 0:
            notify.on_restore(say("child"))
            print("ready", flush=True)
            time.sleep(60)
        """
    with running(agent(more)) as process:
        assert said(process) == "ready"
        (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        try:
            with boards_of(child) as boards:
                assert not boards.want_word
                boards.restored()
                assert said(process) == "child"
            with boards_of(process.pid) as boards:
                boards.restored()
                assert said(process) == "restore"
        finally:
            os.kill(child, 9)


def test_a_program_that_closes_all_descriptors_gets_another_board() -> None:
    """Descriptors that were closed and are others' now are left alone; the next call makes a new board."""
    more = """
        import os, tempfile
        os.closerange(3, 100)
        others = [tempfile.TemporaryFile() for _ in range(8)]
        notify.on_restore(say("again"))
        assert all(os.fstat(file.fileno()).st_size == 0 for file in others)
        """
    with running(agent(more)) as process, boards_of(process.pid) as boards:
        assert boards.want_word
        boards.restored()
        assert [said(process), said(process)] == ["restore", "again"]


def test_asyncio_is_told_through_its_loop() -> None:
    """The way that the module describes for asyncio wakes a coroutine."""
    code = """
        import asyncio
        from crcli import notify

        async def main():
            loop, event = asyncio.get_running_loop(), asyncio.Event()
            notify.on_restore(lambda: loop.call_soon_threadsafe(event.set))
            print("ready", flush=True)
            await event.wait()
            print("awake", flush=True)

        asyncio.run(main())
        """
    with running(code) as process, boards_of(process.pid) as boards:
        boards.restored()
        assert said(process) == "awake"


def test_waiting_in_a_callback_is_an_error() -> None:
    """A callback that waits for a restore would wait for itself."""
    more = "notify.on_restore(notify.wait_restored)\nnotify.on_restore(say('next'))"
    code = "import sys; sys.stderr = open('/dev/null', 'w')\n" + agent(more)
    with running(code) as process, boards_of(process.pid) as boards:
        boards.restored()
        assert [said(process), said(process)] == ["restore", "next"]


# --- crcli's side: what a process may do to it -------------------------------------------------------------

HOSTILE = """
    import ctypes, fcntl, os, struct, sys
    def memfd(data, name="crcli-notify", flags=0):
        fd = os.memfd_create(name, flags)
        os.pwrite(fd, data, 0)
        return fd
    def head(wake=0, callbacks=1, version=1, magic=b"crclinfy"):
        return struct.pack("<8sIIIIII", magic, version, wake, callbacks, 0, 0, 0)
    reader, writer = os.pipe()
    """


FULL = """
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(4096)): pass
    except BlockingIOError: pass
    memfd(head(writer))
    """


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        ("memfd(b'')", False),
        ("memfd(head(writer)[:16])", False),
        ("memfd(head(writer, magic=b'somebody'))", False),
        ("memfd(head(writer, version=2))", False),
        ("memfd(head(2**32 - 1))", False),
        ("memfd(head(reader))", False),
        ("memfd(head(os.open('/dev/zero', os.O_RDWR)))", False),
        ("fcntl.fcntl(memfd(head(writer), flags=2), 1033, 15)  # all seals", False),
        ("one = memfd(head(writer)); os.open(f'/proc/self/fd/{one}', os.O_RDONLY); os.close(one)", False),
        ("memfd(head(writer, callbacks=2**32 - 1))  # and never answers", True),
        ("os.ftruncate(memfd(head(writer)), 1 << 40)", True),
        (FULL, True),
    ],
)
def test_a_board_that_is_not_right_does_no_harm(code: str, waits: bool) -> None:
    """Whatever a process calls a board, crcli waits no longer than it was told to, and fails at nothing."""
    with (
        running(textwrap.dedent(HOSTILE) + textwrap.dedent(code) + WAITING) as process,
        boards_of(process.pid) as boards,
    ):
        assert len(boards.checkpoint(0.2)) == waits
        boards.resumed()
        boards.restored()


def test_a_pipe_that_a_process_may_only_read_is_not_written_to(tmp_path: Path) -> None:
    """A process cannot have crcli write where it could not: the FIFO that it names stays empty."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ours = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    code = f"memfd(head(os.open({str(fifo)!r}, os.O_RDONLY)))"
    with running(textwrap.dedent(HOSTILE) + code + WAITING) as process, boards_of(process.pid) as boards:
        boards.restored()
    with pytest.raises(BlockingIOError):
        os.read(ours, 1)
    os.close(ours)


def test_a_process_that_dies_meanwhile_is_not_waited_for() -> None:
    """A program that ends in its callback holds nobody up."""
    more = "import os\nnotify.on_checkpoint(lambda: os._exit(1))"
    with running(agent(more)) as process, boards_of(process.pid) as boards:
        assert boards.checkpoint(60) == []
        boards.resumed()


def test_a_slow_callback_is_named_and_goes_on() -> None:
    """Who is not done in time is reported; its callback ends, and then it hears of the end."""
    more = "import time\nnotify.on_checkpoint(lambda: time.sleep(0.5))\nnotify.on_checkpoint(say('late'))"
    with running(agent(more)) as process, boards_of(process.pid) as boards:
        assert [one.pid for one in boards.checkpoint(0.1)] == [process.pid]
        boards.resumed()
        assert [said(process) for _ in range(3)] == ["checkpoint", "late", "resume"]


def test_who_wants_no_word_before_a_dump_is_not_told() -> None:
    """Without on_checkpoint callbacks there is nothing to wait for."""
    code = "from crcli import notify\nnotify.wait_restored(0)" + WAITING
    with running(code) as process, boards_of(process.pid) as boards:
        assert not boards.want_word and boards.checkpoint(60) == []


def test_nothing_of_a_process_stays_with_crcli() -> None:
    """After the boards were left crcli has no descriptor more than before, and closed is closed."""
    with running(agent()) as process:
        before = os.listdir("/proc/self/fd")
        with boards_of(process.pid, process.pid) as boards:
            flags = [fcntl.fcntl(one.memory, fcntl.F_GETFD) for one in boards._boards]
            assert flags == [fcntl.FD_CLOEXEC]
            boards.checkpoint(10)
        assert os.listdir("/proc/self/fd") == before


def test_both_sides_mean_the_same_board() -> None:
    """The name that crcli looks for is the one that the kernel shows."""
    with running(agent()) as process:
        links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
    assert notify.LINK in links and contract.HEAD.size == 32

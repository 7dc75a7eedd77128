"""Interactive shells in pseudo-terminals that the tree drives itself: what an agent is, most of the time."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from crcli.criu import standby
from crcli.criu.binary import criu_command
from crcli.process import host_turn, terminals
from tests.support.crcli import Crcli, end, tree_of, wait_until
from tests.support.faults import Attempt, network_of_our_own, state_of
from tests.support.programs import Program, spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

AGENT = """
import os, pty, select
child, master = pty.fork()
if child == 0:
    {prepare}
    os.execvp({command}[0], {command})
typed = os.open("typed", os.O_RDWR)
shown = os.open("shown", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready")
while True:
    ready = select.select([typed, master], [], [])[0]
    if typed in ready:
        os.write(master, os.read(typed, 1000))
    if master in ready:
        try:
            os.write(shown, os.read(master, 1000))
        except OSError:
            break
print("shell:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
select.select([], [], [])
"""
"""Starts a shell in a terminal of its own: types what comes out of a FIFO, and writes down what is shown."""

_DELETED = 0x200
"""IN_DELETE of inotify."""

SHELLS = {
    "dash": "dash -i",
    "bash": "bash --norc --noprofile -i",
    "busybox": "busybox ash -i",
}


class Agent:
    """A process that drives a shell; `pid` is where it is now."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = program
        self.pid = program.pid
        self._folder = folder
        self._seen = 0

    def type(self, keys: str, *expected: str) -> None:
        """Type this, and return once all of that was shown, in this order."""
        typed = os.open(self._folder / "typed", os.O_WRONLY)
        os.write(typed, keys.encode())
        os.close(typed)
        for text in expected:
            self._see(text.encode())

    @property
    def shown(self) -> bytes:
        """All that it has shown."""
        return (self._folder / "shown").read_bytes()

    def _see(self, text: bytes) -> None:
        try:
            wait_until(lambda: text in self.shown[self._seen :], "")
        except AssertionError:
            raise AssertionError(f"{text!r} does not come after {self.shown[self._seen :]!r}") from None
        self._seen = self.shown.index(text, self._seen) + len(text)

    @property
    def shell(self) -> int:
        """The pid of its shell."""
        return _children(self.pid)[0]

    def terminals(self) -> dict[int, str]:
        """What the shell has open of its terminal."""
        return _terminals(self.shell)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _terminals(pid: int) -> dict[int, str]:
    links = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    return {fd: path for fd, path in links.items() if path.startswith(("/dev/pt", "/dev/tty"))}


@contextmanager
def agent(
    folder: Path, command: str, prepare: str = "pass", before: str = "", **options: Any
) -> Iterator[Agent]:
    """An agent with this shell, which has shown its first prompt."""
    place = folder / "agent"
    place.mkdir()
    os.mkfifo(place / "typed")
    words = shlex.split(command)
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    code = before + AGENT.format(command=words, prepare=prepare)
    environment = os.environ | {"PS1": "> ", "TERM": "dumb"}
    with spawn_python(code, cwd=place, env=environment, **options) as program:
        found = Agent(program, place)
        found.type("", "> ")
        yield found


def use_jobs(one: Agent) -> None:
    """See that the shell controls its jobs, and gets what is typed: nothing is left running."""
    one.type("echo $((6 * 7)) >/dev/tty\n", "\n42", "> ")
    one.type("sleep 500\n", "sleep 500\r\n")
    wait_until(lambda: _is_in_front(one, "sleep"), "the job is not in the foreground")
    one.type("\x1a", "> ")
    one.type("bg\n", "sleep 500")
    # No prompt is waited for: busybox loses it when word that the job runs on comes as it writes it (EINTR).
    wait_until(lambda: all(_state(job) == "S" for job in _children(one.shell)), "the job does not run on")
    one.type("jobs\n", "unning", "> ")
    one.type("fg\n", "sleep 500\r\n")
    wait_until(lambda: _is_in_front(one, "sleep"), "the job is not in the foreground again")
    one.type("\x03", "> ")
    one.type("jobs; echo no jobs\n", "\r\nno jobs", "> ")


def _is_in_front(one: Agent, comm: str) -> bool:
    """Whether the terminal's foreground is a child of the shell with this name."""
    foreground = int(Path(f"/proc/{one.shell}/stat").read_text().rpartition(")")[2].split()[5])
    try:
        return foreground != one.shell and Path(f"/proc/{foreground}/comm").read_text().strip() == comm
    except FileNotFoundError:
        return False


def leave_shell(one: Agent) -> None:
    """Leave the shell, and see that its agent notices."""
    one.type("exit 3\n")
    wait_until(lambda: "shell: 3" in one.program.output, "its agent does not see the shell end")


@pytest.mark.parametrize("namespace", ["host", "new"])
@pytest.mark.parametrize("shell", SHELLS)
def test_an_agents_shell_comes_back(crcli: Crcli, tmp_path: Path, shell: str, namespace: str) -> None:
    """An agent with an interactive shell is moved twice: keys, jobs and the shell's end are as before."""
    with agent(tmp_path, SHELLS[shell]) as one:
        use_jobs(one)
        for _ in range(2):
            one.pid = crcli.move(one.pid, "--pid-namespace", namespace)["host_pid"]
            use_jobs(one)
        leave_shell(one)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_that_runs_on_is_as_it_was(crcli: Crcli, tmp_path: Path, shell: str) -> None:
    """A dump that leaves the tree running changes nothing of the shell, and its image can be restored."""
    with agent(tmp_path, SHELLS[shell]) as one:
        one.type("sleep 500 &\n", "> ")
        terminals, flags = one.terminals(), _flags(one.shell)
        image = crcli.dump(one.pid, "--leave-running")["image"]
        assert one.terminals() == terminals and _flags(one.shell) == flags
        one.type("kill %1; wait\n", "> ")
        use_jobs(one)
        crcli.dump(one.pid)
        one.pid = crcli.restore(image)["host_pid"]
        one.type("jobs\n", "unning", "> ")
        one.type("fg\n", "sleep 500\r\n")
        wait_until(lambda: _is_in_front(one, "sleep"), "the job is not in the foreground")
        one.type("\x03", "> ")
        use_jobs(one)
        leave_shell(one)


def _flags(pid: int) -> dict[int, int]:
    """How the terminals are open."""
    return {fd: _how(pid, fd) for fd in _terminals(pid)}


def _how(pid: int, fd: int) -> int:
    """A descriptor's flags, O_LARGEFILE aside: that is always said of what CRIU has opened."""
    flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()[1].split()[1]
    return int(flags, 8) & ~0o100000


def test_what_is_open_as_dev_tty_is_the_terminal_itself_afterwards(crcli: Crcli, tmp_path: Path) -> None:
    """Each descriptor of /dev/tty becomes one of the terminal's own device, opened as it was."""
    prepare = "os.set_inheritable(os.open('/dev/tty', os.O_RDONLY | os.O_NONBLOCK), True)"
    with agent(tmp_path, "dash -i", prepare) as one:
        before, flags = one.terminals(), _flags(one.shell)
        assert before[3] == before[10] == "/dev/tty"
        report = crcli.dump(one.pid)
        assert "terminal-reopened" in [finding["name"] for finding in report["findings"]]
        one.pid = crcli.restore(report["image"])["host_pid"]
        after = one.terminals()
        assert after.keys() == before.keys() and set(after.values()) == {after[0]}
        assert after[0].startswith("/dev/pts/") and _flags(one.shell) == flags
        assert os.stat(f"/proc/{one.shell}/fd/10").st_rdev == os.stat(f"/proc/{one.shell}/fd/0").st_rdev


def test_dev_tty_in_another_session_is_still_that_terminal(crcli: Crcli, tmp_path: Path) -> None:
    """A descriptor of /dev/tty is the terminal of who opened it, also where nothing controls its holder."""
    with agent(tmp_path, "dash -i") as one:
        one.type("sh -c 'setsid sleep 500; true' 3<>/dev/tty &\n", "> ")
        wait_until(lambda: [pid for pid in _daemons(one) if os.getsid(pid) == pid], "it has no session")
        one.pid = crcli.move(one.pid)["host_pid"]
        (sleep,) = _daemons(one)
        assert _terminals(sleep)[3] == one.terminals()[0]
        one.type("kill %1; wait\n", "> ")
        os.kill(sleep, signal.SIGTERM)
        use_jobs(one)


def _daemons(one: Agent) -> list[int]:
    """What the jobs of its shell have started."""
    return [pid for job in _children(one.shell) for pid in _children(job)]


def test_a_shell_below_a_shell_is_named(crcli: Crcli, tmp_path: Path) -> None:
    """A bash below another shell comes back, and the dump says what it cannot do then."""
    with agent(tmp_path, "dash -i") as one:
        one.type("bash --norc --noprofile -i\n", "> ")
        report = crcli.dump(one.pid)
        named = {finding["name"]: finding["evidence"] for finding in report["findings"]}
        (job,) = named["terminal-jobs"]["processes"]
        assert job["command"] == "bash"
        one.pid = crcli.restore(report["image"])["host_pid"]
        one.type("echo $((6 * 7))\n", "\n42", "> ")
        one.type("echo lost >/dev/tty\n", "No such device", "> ")
        one.type("exit\n", "> ")
        use_jobs(one)


# --- numbers ------------------------------------------------------------------------------------------------


def test_a_terminal_far_from_the_lowest_number_comes_back(crcli: Crcli, tmp_path: Path) -> None:
    """CRIU looks for a terminal's number near the lowest that is free: others get such a one."""
    crowd = [os.openpty() for _ in range(40)]
    try:
        with agent(tmp_path, "dash -i") as one:
            image = crcli.dump(one.pid)["image"]
            one.pid = crcli.restore(image)["host_pid"]
            use_jobs(one)
            close(crowd)
            one.pid = crcli.move(one.pid)["host_pid"]
            use_jobs(one)
    finally:
        close(crowd)


def test_a_low_number_that_is_given_back_at_the_last_moment_is_taken(crcli: Crcli, tmp_path: Path) -> None:
    """From there the number that was free a moment ago is too far for CRIU: the tree gets a nearer one."""
    crowd = [os.openpty() for _ in range(40)]
    try:
        with agent(tmp_path, "dash -i") as one:
            image = crcli.dump(one.pid)["image"]
            with when_a_terminal_is_given_back(lambda: close([crowd.pop(1)])):
                one.pid = crcli.restore(image)["host_pid"]
            assert len(crowd) == 39
            use_jobs(one)
    finally:
        close(crowd)


def test_a_number_that_lost_its_name_is_not_taken_for_free(crcli: Crcli, tmp_path: Path) -> None:
    """A terminal that only a background program has still open is not in /dev/pts, but in use."""
    crowd = [os.openpty() for _ in range(2)]
    try:
        with agent(tmp_path, "dash -i") as one:
            image = crcli.dump(one.pid)["image"]
            crowd.append(os.openpty())  # the agent's, most likely
            for number in range(3):
                os.close(crowd[number][0])
                crowd[number] = (-1, crowd[number][1])
            one.pid = crcli.restore(image)["host_pid"]
            use_jobs(one)
    finally:
        close(crowd)


def test_restores_at_once_do_not_take_each_others_numbers(crcli: Crcli, tmp_path: Path) -> None:
    """Agents whose terminals had the same number, restored at the same time, all come back."""
    with ExitStack() as held:
        agents: list[Agent] = []
        images: list[str] = []
        for number in range(4):
            folder = tmp_path / str(number)
            folder.mkdir()
            agents.append(held.enter_context(agent(folder, "dash -i")))
            images.append(crcli.dump(agents[-1].pid, "--name", f"agent-{number}")["image"])
        with ThreadPoolExecutor() as threads:
            restored = list(threads.map(crcli.restore, images))
        for one, report in zip(agents, restored, strict=True):
            one.pid = report["host_pid"]
            use_jobs(one)


@contextmanager
def taking_terminals(times: int, at_once: int = 1) -> Iterator[list[int]]:
    """Until the end of the block, take the next numbers for new terminals as soon as one is given back.

    So often: whoever looks which number is free, to open that one later, then finds it taken. Yields the
    terminals that were taken.
    """
    taken: list[int] = []

    def take() -> None:
        taken.extend(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY) for _ in range(at_once))

    try:
        with when_a_terminal_is_given_back(take, times):
            yield taken
    finally:
        for fd in taken:
            os.close(fd)


@contextmanager
def when_a_terminal_is_given_back(act: Callable[[], object], times: int = 1) -> Iterator[None]:
    """Until the end of the block, do this as soon as a terminal is given back, so often."""
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    libc.inotify_add_watch(watch, b"/dev/pts", _DELETED)
    ending, end = os.pipe()

    def attend() -> None:
        left = times
        while left and watch in select.select([watch, ending], [], [])[0]:
            os.read(watch, 4096)
            act()
            left -= 1

    attending = threading.Thread(target=attend)
    attending.start()
    try:
        yield
    finally:
        os.close(end)
        attending.join()
        os.close(watch)
        os.close(ending)


def test_a_number_that_is_taken_at_the_last_moment_is_given_up(crcli: Crcli, tmp_path: Path) -> None:
    """Somebody else's terminals come up under numbers that were free a moment ago: the tree gets others."""
    with agent(tmp_path, "dash -i") as one:
        image = crcli.dump(one.pid)["image"]
        with taking_terminals(times=2) as taken:
            one.pid = crcli.restore(image)["host_pid"]
            assert len(taken) == 2
            use_jobs(one)


@pytest.mark.alone  # terminals that other tests give back are none of the forty
def test_a_number_that_is_taken_again_and_again_is_named(crcli: Crcli, tmp_path: Path) -> None:
    """After a few tries the restore ends with what stood in its way, and nothing is left running."""
    with agent(tmp_path, "dash -i") as one:
        image = crcli.dump(one.pid)["image"]
        with taking_terminals(times=40, at_once=25):
            error = crcli.restore(image, code=21)["error"]
        assert error["cause"] == "terminal-taken" and error["retry"]
        one.pid = crcli.restore(image)["host_pid"]
        use_jobs(one)


HOLD = """
import sys
from crcli.process import terminals
if sys.argv[1:] == ["elsewhere"]:
    from crcli import kernel
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("none", "/run", "tmpfs")
turn = terminals.terminal_turn()
print("has it", flush=True)
sys.stdin.read()
turn.end()
"""

LOCK = """
import fcntl, os, sys
fd = os.open("/dev/pts", os.O_RDONLY)
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
fcntl.flock(fd, fcntl.LOCK_EX)
if os.fork() > 0:
    print("has it", flush=True)
    os._exit(0)
sys.stdin.read()
"""


@contextmanager
def standing(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has something until the end of the block, or its input's."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield process
        process.stdin.close()


def _has_it(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "has it\n"


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_restores_take_turns_in_all_mount_namespaces(where: str) -> None:
    """One has its turn when another has ended his, also where they have no folder but /dev/pts in common."""
    assert_takes_turns(where)


def test_nobody_but_root_holds_up_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else who has locked /dev/pts is not waited for, and those who have their turn still wait."""
    monkeypatch.setattr(host_turn, "_TURN_LIMIT_S", 1e6)
    with standing(LOCK) as other:
        _has_it(other)
        terminals.terminal_turn().end()
        assert_takes_turns("here")


def assert_takes_turns(where: str) -> None:
    """Assert that one who comes later, there, has to wait until the first has ended."""
    with standing(HOLD) as first:
        _has_it(first)
        with standing(HOLD, where) as second:
            assert second.stdout is not None and first.stdin is not None
            assert not select.select([second.stdout], [], [], 1.0)[0]
            first.stdin.close()
            _has_it(second)


def close(pairs: list[tuple[int, int]]) -> None:
    """Close what is open of these, once."""
    while pairs:
        for fd in pairs.pop():
            if fd >= 0:
                os.close(fd)


# --- /dev/tty, and no other descriptor of the terminal -----------------------------------------------------

ONLY_DEV_TTY = """
tty = os.open('/dev/tty', os.O_RDWR)
    null = os.open('/dev/null', os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.write(tty, b'> ')
    while True:
        os.write(tty, b'got ' + os.read(tty, 100) + b'> ')
"""


def test_a_terminal_that_is_open_only_as_dev_tty_comes_back(crcli: Crcli, tmp_path: Path) -> None:
    """A program that has its terminal open as /dev/tty and by no other name has it again, and its owner."""
    prepare = "os.chown(os.ttyname(0), 1234, 5)\n    " + ONLY_DEV_TTY.strip()
    with agent(tmp_path, "true", prepare) as one:
        one.type("something\n", "got something", "> ")
        for _ in range(2):
            one.pid = crcli.move(one.pid)["host_pid"]
            one.type("more\n", "got more", "> ")
        (path,) = one.terminals().values()
        assert os.stat(path).st_uid == 1234
        one.type("\x03")
        wait_until(lambda: "shell: -2" in one.program.output, "Ctrl-C does not reach it")


def test_what_cannot_be_saved_unread_is_not_lost(crcli: Crcli, tmp_path: Path) -> None:
    """Of such a terminal CRIU saves no unread bytes: while there are any, it is not dumped, and goes on."""
    prepare = ONLY_DEV_TTY.strip().replace("while True:", "os.kill(os.getpid(), 19)\n    while True:")
    with agent(tmp_path, "true", prepare) as one:
        wait_until(lambda: _state(one.shell) == "T", "it does not stop")
        one.type("unread\n")
        wait_until(lambda: b"unread" in one.shown, "it is not echoed")
        error = crcli.dump(one.pid, code=11)["error"]
        assert "unread" in error["message"] or "read" in error["message"]
        os.kill(one.shell, signal.SIGCONT)
        one.type("", "got unread", "> ")
        one.pid = crcli.move(one.pid)["host_pid"]
        one.type("more\n", "got more", "> ")


# --- a dump that fails when CRIU has emptied the terminals -------------------------------------------------

FAILURES: dict[str, Callable[[Attempt], object]] = {
    "interrupted": lambda attempt: attempt.send(signal.SIGTERM),
    "crcli killed": lambda attempt: attempt.send(signal.SIGKILL),
    "CRIU killed": Attempt.kill_criu,
    "trial failed": Attempt.kill_deep_criu,
}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_a_dump_that_fails_late_leaves_terminals_as_they_were(how: str, shell: str, tmp_path: Path) -> None:
    """What was typed ahead, a line half typed, and what nobody has read are there; reads wait as they did."""
    with network_of_our_own(), agent(tmp_path, SHELLS[shell]) as one:
        one.type("sleep 500\n", "sleep 500\r\n")
        wait_until(lambda: _is_in_front(one, "sleep"), "the job is not in the foreground")
        one.type("echo $((6 * 7))\n", "echo $((6 * 7))\r\n")
        one.type("echo half", "half")
        os.kill(one.pid, signal.SIGSTOP)
        device = os.open(one.terminals()[0], os.O_WRONLY | os.O_NOCTTY)
        os.write(device, b"unread\n")
        os.close(device)
        before = _flags(one.pid), _flags(one.shell)
        store = f"file://{tmp_path}/store"
        words = {"CRCLI_CRIU": _criu_that_stops_in_the_trial(tmp_path / "criu")}
        attempt = Attempt(tmp_path, ("dump", str(one.pid), "--store", store), words)
        assert attempt.wait_for(lambda: state_of(attempt.deep_criu()) == "T"), attempt.describe()
        assert _how(one.shell, 0) & os.O_NONBLOCK
        FAILURES[how](attempt)
        attempt.end()
        assert attempt.code != 0 and (_flags(one.pid), _flags(one.shell)) == before
        os.kill(one.pid, signal.SIGCONT)
        one.type("", "unread\r\n")
        (job,) = _children(one.shell)
        os.kill(job, signal.SIGTERM)
        one.type("", "42\r\n", "> ")
        one.type(" done\n", "\r\nhalf done\r\n", "> ")
        use_jobs(one)


def test_what_was_taken_is_given_back_before_crcli_is_seen_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU hears that crcli was killed, and ends, while the standby's own connection to it is still open."""
    given_back: list[int] = []
    monkeypatch.setattr(standby, "give_back_unread", lambda images, root: given_back.append(root))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    images = os.open(tmp_path, os.O_RDONLY)
    try:
        watch = standby._Watch(theirs, os.getpid(), images, standby._Before({}, {}), kills=True, stays=True)
        watch._hear()
        watch._after_end()
    finally:
        ours.close()
        theirs.close()
        os.close(images)
    assert given_back == [os.getpid()]


def _criu_that_stops_in_the_trial(path: Path) -> str:
    """Write a CRIU that stops itself before it does anything in another network; the one that dumps waits
    for crcli then."""
    ours = os.readlink("/proc/thread-self/ns/net")
    stop = f'[ "$(readlink /proc/self/ns/net)" = "{ours}" ] || kill -STOP $$'
    path.write_text(f'#!/bin/sh\n{stop}\nexec {shlex.join(criu_command())} "$@"\n')
    path.chmod(0o755)
    return str(path)


KILLER = """
import os, signal, time
from crcli.plugins import hookimpl
from crcli.process.identity import identify

@hookimpl
def crcli_dump_frozen(target):
    victim = identify(int(os.environ["VICTIM"]))
    os.kill(victim.pid, signal.SIGKILL)
    while victim.alive():
        time.sleep(0.001)
"""


@pytest.mark.parametrize(
    "shell,who", [("dash", "shell"), ("bash", "agent"), ("bash", "shell"), ("bash", "job")]
)
def test_who_is_killed_while_the_tree_stands_still_is_missed(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, who: str
) -> None:
    """The dump fails and names who is gone, whichever of its processes it is whose terminal must be asked."""
    _install(tmp_path / "site", KILLER)
    with agent(tmp_path, SHELLS[shell]) as one:
        everybody = tree_of(one.pid)
        one.type("sh -c 'sleep 500; true' 3<>/dev/tty\n", "sh -c")
        wait_until(lambda: _is_in_front(one, "sh"), "the job is not in the foreground")
        everybody = tree_of(one.pid)
        victim = {"agent": one.pid, "shell": one.shell, "job": _children(one.shell)[0]}[who]
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        monkeypatch.setenv("VICTIM", str(victim))
        error = crcli.dump(one.pid, code=12 if who == "agent" else 11)["error"]
        assert "killed" in error["message"] and error["state"] == ("dead" if who == "agent" else "running")
        end(everybody)


def _install(site: Path, code: str) -> None:
    """Install a plug-in where `site` is on Python's path."""
    about = site / "killer-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: killer\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[crcli.plugins]\nkiller = killer\n")
    (site / "killer.py").write_text(code)


# --- terminals outside --------------------------------------------------------------------------------------


def test_a_terminal_outside_stays_one_terminal(crcli: Crcli, tmp_path: Path) -> None:
    """A terminal outside, open as /dev/tty and by its name, is one new terminal, and none of those inside."""
    driver, device = os.openpty()
    code = (
        "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "import os\nabove = os.open('/dev/tty', os.O_RDWR)\n"
    )
    try:
        with agent(tmp_path, "dash -i", before=code, stdin=device) as one:
            assert set(one.terminals().values()) > {"/dev/tty"}
            for _ in range(2):
                one.pid = crcli.move(one.pid)["host_pid"]
                paths = {path for path in _terminals(one.pid).values() if path != "/dev/ptmx"}
                assert len(paths) == 1 and not paths & set(one.terminals().values())
                use_jobs(one)
    finally:
        os.close(driver)
        os.close(device)


PAINTER = """
    import fcntl, os, signal, termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b"painted %d %d." % tuple(os.get_terminal_size(0))))
    os.write(1, b"ready.")
    while True:
        if os.read(0, 1) == b"q":
            break
    """


def test_who_comes_back_in_our_terminal_paints_it_anew_and_has_it_alone(crcli: Crcli) -> None:
    """Also in one of the same size: sizes are passed on, and crcli writes nothing more there."""
    there, here = _Screen(), _Screen()
    with (
        closing(there),
        closing(here),
        spawn_python(PAINTER, ready_line="", stdin=there.device, stdout=there.device) as program,
    ):
        there.until(b"ready.")
        crcli.dump(program.pid, "--name", "painter")
        line = [sys.executable, "-m", "crcli", "restore", "painter", "--store", crcli.store]
        restore = subprocess.Popen(
            [*line, "--wait", "--stdio", "inherit"],
            env=crcli.environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(here.device, termios.TIOCSCTTY, 0),
            **dict.fromkeys(("stdin", "stdout", "stderr"), here.device),
        )
        try:
            here.until(b"painted 80 24.")
            time.sleep(1.5)  # the line that shows progress comes several times a second
            here.until(b"")
            assert b"\x1b[K" not in here.seen.partition(b"painted")[2]
            termios.tcsetwinsize(here.driver, (20, 60))
            here.until(b"painted 60 20.")
            os.write(here.driver, b"q\n")
            assert restore.wait(60) == 0
        finally:
            restore.terminate()  # which is passed on
            restore.wait(60)


class _Screen:
    """A terminal of 80 by 24, and what was shown in it."""

    def __init__(self) -> None:
        self.driver, self.device = os.openpty()
        termios.tcsetwinsize(self.driver, (24, 80))
        self.seen = b""

    def until(self, text: bytes) -> None:
        """Read until it shows this."""
        wait_until(lambda: self._look() and text in self.seen, f"{text!r} is not shown")

    def _look(self) -> bool:
        while select.select([self.driver], [], [], 0)[0]:
            self.seen += os.read(self.driver, 65536)
        return True

    def close(self) -> None:
        """Give it back."""
        os.close(self.driver)
        os.close(self.device)


LEADER = """
    import os, termios
    console = os.open("console", os.O_RDONLY)
    os.close(os.open("/dev/tty", os.O_RDONLY))  # so it controls this session
    print("ready", flush=True)
    for number in range(10):
        with open("asked") as asked:
            asked.read()  # until who asks has closed it: one look for one question
        termios.tcgetattr(console)
        print(f"has it {number}", flush=True)
    """


def test_a_console_is_not_hung_up_by_the_trial(tmp_path: Path, crcli: Crcli) -> None:
    """Who has a console as its controlling terminal, and is left running, has it afterwards."""
    os.mknod(tmp_path / "console", stat.S_IFCHR | 0o600, os.makedev(4, 63))
    os.mkfifo(tmp_path / "asked")
    try:
        os.close(os.open(tmp_path / "console", os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        pytest.skip(f"no virtual consoles here: {error}")
    with spawn_python(LEADER, cwd=tmp_path) as program:
        for number in range(2):
            crcli.dump(program.pid, "--leave-running")
            (tmp_path / "asked").write_text("")
            program.wait_for(f"has it {number}")

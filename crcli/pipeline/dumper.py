"""A process that stands ready to dump, for a supervisor that has no time to lose when it must.

All that a dump imports, and the way to the store, it has before it is asked: half a second and more that a
`crcli dump` would spend first. It is a process of its own (and of its own session) so that the signals, the
memory and the failures of a dump are not the supervisor's. Killed, it is an error like any other: CRIU and
the standby let the tree go.

The supervisor writes lines of JSON into its stdin, and reads lines of JSON:

    {"dump": {DumpOptions}, "until": T}   → {"phase": …} {"amount": [done, total]} {"finding": {…}} …
                                            and last {"report": {…}} or {"error": {…}}
    {"until": T}                          another deadline for the dump under way
    {"stop": true}                        end the dump under way, as SIGTERM ends `crcli dump`
    {"retire": {name, job, keep}}         remove older images, beside the dumps → {"retired": [image…]}

T is a deadline by the clock that both have, time.monotonic(), or null.

When the supervisor dies, or closes the line, a dump under way is stopped so too (finished, if it is past its
point of no return), and the process ends. No thread listens while it dumps, for it forks: the kernel sends
SIGIO when there is a word, or nobody left to say one.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import crcli
from crcli import kernel
from crcli.cause import Cause
from crcli.errors import CrcliError, DumpFailed, TreeState
from crcli.findings import Finding, Severity
from crcli.pipeline.interrupts import Interrupted, ring_in
from crcli.pipeline.shared import Shared
from crcli.pipeline.stages import DumpOptions, Outcome, Silent
from crcli.pipeline.watch import tree_state
from crcli.process.identity import identify
from crcli.process.tree import scan_tree
from crcli.records import asdict, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from crcli.pipeline.stages import Progress
    from crcli.process.tree import Tree

_CHUNK = 1 << 16
CLOSE_LIMIT_S = 30.0
"""How long a dump may take to be undone (seconds): a store that does not answer holds up its end."""

_AMOUNTS_EVERY_S = 0.05
"""How often (seconds) a dump says how many bytes are done."""


class Dumper:
    """The process as its supervisor has it. One dump at a time; not to be used by two threads at once, but
    for `stop` and `set_deadline`.

    A process that was killed is replaced when it is next needed. `fileno` is readable when `hear` has
    something to take in, so that a loop can wait for it and for other things.
    """

    def __init__(self, store: str, endpoint_url: str | None = None) -> None:
        """Start it; it gets ready while the caller goes on."""
        self.store = store
        self.endpoint_url = endpoint_url
        self._events = select.epoll()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_left = False
        self._pidfd = -1
        self._heard = bytearray()
        self._asked: DumpOptions | None = None
        self._tree: Tree | None = None
        self.retired: list[str] = []
        """The images that were removed; whoever reads of them may clear it."""
        self._start()

    @property
    def pid(self) -> int:
        """Its pid; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    def fileno(self) -> int:
        """See the class."""
        return self._events.fileno()

    def dump(self, options: DumpOptions, progress: Progress | None = None) -> dict[str, Any]:
        """Have a tree dumped, and return the report, as `crcli dump --json` prints it.

        Raises the error that the dump ended with, as `pipeline.dump.dump` does, and DumpFailed when the
        process was killed.
        """
        self.begin(options)
        while True:
            select.select([self], [], [])
            if (report := self.hear(progress)) is not None:
                return report

    def begin(self, options: DumpOptions) -> None:
        """Have a tree dumped; `hear` says what becomes of it."""
        assert self._asked is None, "one dump at a time"
        self._tree = _look_at(options.pid)
        self._asked = options
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._say({"dump": _plain(options), "until": _until(options.deadline_s)})

    def hear(self, progress: Progress | None = None) -> dict[str, Any] | None:
        """Take in what was said since; return the report if that was the end of the dump.

        Never waits. Raises what `dump` raises.
        """
        for word in self._words():
            if "report" in word:
                self._asked = None
                report: dict[str, Any] = word["report"]
                return report
            if "error" in word:
                self._asked = None
                raise error_from_json(word["error"])
            self.retired += word.get("retired", ())
            _tell(word, progress or Silent())
        if self._process is not None and self._process.poll() is not None:
            self._forget()
            if self._asked is not None:
                raise self._lost()
        return None

    def stop(self) -> None:
        """Have the dump under way end as SIGTERM ends `crcli dump`; `hear` says how it ended."""
        self._say({"stop": True})

    def kill(self) -> None:
        """Kill it: CRIU lets go of the tree, and what was not durable is nothing. `hear` says so."""
        if self._process is not None:
            self._process.kill()

    def set_deadline(self, seconds: float) -> None:
        """Give the dump under way another deadline, from now."""
        self._say({"until": _until(seconds)})

    def retire(self, name: str, job: Mapping[str, Any], keep: int) -> None:
        """Have older images of a job removed, once no dump is under way; see image.retention.retire.

        What is removed is told to the `retired` of whoever hears next; what fails is left for the next time.
        """
        self._say({"retire": {"name": name, "job": dict(job), "keep": keep}})

    def leave(self) -> None:
        """Have it end by itself, as `close` does, without waiting for that. Only `close` may follow."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._is_left = True

    def close(self) -> None:
        """End it. A dump under way is stopped, and waited for: the tree runs on, or its image is durable.

        What does not end within CLOSE_LIMIT_S is killed.
        """
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            until = time.monotonic() + CLOSE_LIMIT_S
            while not self._is_left and self._process.poll() is None:  # it must not wait for us to read
                select.select([self], [], [], 1.0)
                for _ in self._words():
                    continue
                if time.monotonic() > until:
                    self._process.kill()
            self._forget()
        self._asked = None
        self._events.close()

    def __enter__(self) -> Dumper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._forget()
        here = os.path.dirname(os.path.dirname(crcli.__file__))
        arguments = [str(os.getpid()), self.store, self.endpoint_url or ""]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, here, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._events.register(self._process.stdout.fileno(), select.EPOLLIN)
        self._events.register(self._pidfd, select.EPOLLIN)

    def _forget(self) -> None:
        """Give back what is left of a process that has ended."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            self._events.unregister(process.stdout.fileno())
            self._events.unregister(self._pidfd)
            os.close(self._pidfd)
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
            if not self._is_left:
                process.wait()
        self._heard.clear()

    def _say(self, word: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            try:
                os.write(self._process.stdin.fileno(), _line(word))
            except OSError:
                pass  # it was killed: `hear` says so

    def _words(self) -> Iterator[dict[str, Any]]:
        """What was said and not heard yet."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while True:
            try:
                piece = os.read(fd, _CHUNK)
            except BlockingIOError:
                return
            if not piece:
                if self._process.poll() is None:
                    self._process.wait()  # it has closed the line, and is about to end
                return
            self._heard += piece
            while (end := self._heard.find(b"\n")) >= 0:
                line = bytes(self._heard[:end])
                del self._heard[: end + 1]
                yield json.loads(line)

    def _lost(self) -> DumpFailed:
        from crcli.pipeline.aftermath import lost

        assert self._asked is not None
        options, self._asked = self._asked, None
        return lost(options, tree_state(self._tree) if self._tree is not None else TreeState.DEAD)


_PROGRAM = (
    "import sys; here = sys.argv.pop(1)\n"
    "if here not in sys.path: sys.path.insert(0, here)\n"
    "from crcli.pipeline.dumper import serve; serve(int(sys.argv[1]), sys.argv[2], sys.argv[3] or None)"
)


def _look_at(pid: int) -> Tree | None:
    """The tree as it is; None when there is none, which the dump itself will say better."""
    try:
        return scan_tree(identify(pid))
    except (CrcliError, OSError):
        return None


def _tell(word: Mapping[str, Any], progress: Progress) -> None:
    """Pass on what a dump said on its way."""
    if "phase" in word:
        progress.phase(word["phase"])
    elif "amount" in word:
        progress.amount(*word["amount"])
    elif "finding" in word:
        progress.finding(_finding(word["finding"]))


# What both sides say, and how.


def _line(word: Mapping[str, Any]) -> bytes:
    return json.dumps(word).encode() + b"\n"


def _plain(options: DumpOptions) -> dict[str, Any]:
    """Options as JSON has them."""
    return asdict(options)


def _options(plain: Mapping[str, Any], until: float | None) -> DumpOptions:
    """The reverse of `_plain`, with what is left of the time by now."""
    lists = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    options = DumpOptions(**{**plain, **lists})
    return replace(options, outcome=Outcome(plain["outcome"]), deadline_s=_left(until))


def _until(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else time.monotonic() + deadline_s


def _left(until: float | None) -> float | None:
    """Seconds, more than 0; None: no end."""
    return None if until is None else max(0.001, until - time.monotonic())


def _finding(plain: Mapping[str, Any]) -> Finding:
    return Finding(**{**plain, "severity": Severity(plain["severity"])})


def error_as_json(error: CrcliError) -> dict[str, Any]:
    """An error in full, for a process that is to raise it again."""
    return {
        "kind": type(error).__name__,
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "hint": error.hint,
        "state": error.state.value,
        "findings": [finding.as_json() for finding in error.findings],
        "cause": error.cause and asdict(error.cause),
    }


def error_from_json(plain: Mapping[str, Any]) -> CrcliError:
    """The error that `error_as_json` described."""
    cause = plain["cause"]
    return _kinds(CrcliError).get(plain["kind"], CrcliError)(
        plain["message"],
        hint=plain["hint"],
        state=TreeState(plain["state"]),
        findings=[_finding(one) for one in plain["findings"]],
        cause=Cause(**cause) if cause else None,
    )


def _kinds(of: type[CrcliError]) -> dict[str, type[CrcliError]]:
    """A class of errors and those below it, by name."""
    found = {of.__name__: of}
    for one in of.__subclasses__():
        found |= _kinds(one)
    return found


# The process itself.


def serve(supervisor: int, store: str, endpoint_url: str | None) -> None:
    """Get ready, and dump what is asked for until the process `supervisor` has nothing more to say."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a thread that blocks signals may have started us
    asked = _Asked(supervisor)
    try:
        with Answers() as answers:
            store_options = DumpOptions(pid=0, store=store, endpoint_url=endpoint_url)
            _get_ready(asked, store_options)
            retire = partial(_retire, asked.shared, store_options, answers)
            while (options := asked.next(retire)) is not None:
                answers.end(_dumped(options, asked, answers))
                asked.done()
    except BrokenPipeError:
        pass  # nobody is there to be answered
    os._exit(0)  # the interpreter's own end takes a while, and nothing here needs it


def _get_ready(asked: _Asked, options: DumpOptions) -> None:
    """Import what a dump needs, and find the way to the store; what is wrong with either, a dump will say."""
    import crcli.pipeline.many as many  # which imports dump.py, and all below it

    try:
        many.warm(options)
        if options.store.startswith("s3:"):
            asked.shared.open_store(options).close()  # its client is kept; nothing was connected to
    except Exception:
        asked.shared.forget_store()


def _dumped(options: DumpOptions, asked: _Asked, answers: Answers) -> dict[str, Any]:
    from crcli.pipeline.many import attempt

    result = attempt(options, asked.shared, answers)
    if result.report is not None:
        return {"report": result.report.as_json()}
    assert result.error is not None
    return {"error": error_as_json(result.error)}


def _retire(shared: Shared, options: DumpOptions, answers: Answers, wish: Mapping[str, Any]) -> int:
    """Remove older images in a process of its own, so that no dump ever waits for that; return its pid."""
    pid = kernel.quiet_fork()
    if pid:
        return pid
    try:
        from crcli.image.retention import retire

        store = shared.open_store(options)
        removed = retire(store, wish["name"], wish["job"], wish["keep"])
        answers.try_to_say({"retired": [str(ref) for ref in removed]})
    except BaseException:
        pass  # the next image tries again
    finally:
        os._exit(0)


class _AskedShared(Shared):
    """What dumps share, with a look at whether this one is still wanted."""

    def __init__(self, asked: _Asked) -> None:
        super().__init__(keeps_hand=True)
        self._asked = asked

    def see_caller(self) -> None:
        """Raise Interrupted when the dump was told to stop before it listened; set its newest deadline."""
        self._asked.look_before()


class _Asked:
    """The words of the supervisor: requests while none is under way, then what SIGIO tells of."""

    def __init__(self, supervisor: int) -> None:
        self.shared: Shared = _AskedShared(self)
        self._supervisor = supervisor
        self._heard = bytearray()
        self._requests: deque[tuple[Mapping[str, Any], float | None]] = deque()
        self._is_busy = self._is_stopped = self._is_over = False
        self._until: float | None = None
        self._wish: Mapping[str, Any] | None = None
        self._chore = 0
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        os.set_blocking(0, False)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda *_: None)  # between two dumps there is nothing to interrupt
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGIO, self._on_word)
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
        kernel.die_with_parent(signal.SIGIO)  # others may hold the line open: what the supervisor has forked
        self._look_for_supervisor()

    def next(self, retire: Callable[[Mapping[str, Any]], int]) -> DumpOptions | None:
        """Wait for the next dump; None when there will be none. `retire` begins what is to be done beside."""
        while not self._requests:
            if self._is_over:
                return None
            self._begin_chore(retire)
            self._poll.poll()
            self._listen()
        self._is_busy = True
        self._listen()  # what came before we were busy was not told of again
        plain, until = self._requests.popleft()
        return _options(plain, until)

    def _begin_chore(self, retire: Callable[[Mapping[str, Any]], int]) -> None:
        """Have older images removed, if that is wished and not under way: what is left out, the next wish
        comes to."""
        if self._chore and os.waitpid(self._chore, os.WNOHANG)[0]:
            self._chore = 0
        wish, self._wish = self._wish, None
        if wish is not None and not self._chore:
            self._chore = retire(wish)

    def done(self) -> None:
        """The dump has ended and was answered."""
        self._is_busy = self._is_stopped = False
        self._until = None
        signal.setitimer(signal.ITIMER_REAL, 0)  # one that came when nothing could be interrupted

    def look_before(self) -> None:
        """See _AskedShared."""
        if self._is_stopped or self._is_over:
            raise Interrupted(signal.SIGTERM)
        self._set_alarm()

    def _on_word(self, _number: int, _frame: FrameType | None) -> None:
        self._look_for_supervisor()
        if self._is_busy:
            self._listen()

    def _look_for_supervisor(self) -> None:
        if os.getppid() != self._supervisor:
            if not self._is_busy:
                os._exit(0)
            self._stop(is_over=True)

    def _listen(self) -> None:
        """Take in what there is, without waiting."""
        while True:
            try:
                piece = os.read(0, _CHUNK)
            except BlockingIOError:
                break
            if not piece:
                self._stop(is_over=True)
                break
            self._heard += piece
        *lines, rest = bytes(self._heard).split(b"\n")
        self._heard[:] = rest
        for line in lines:
            self._take(json.loads(line))

    def _take(self, word: Mapping[str, Any]) -> None:
        if "dump" in word:
            self._requests.append((word["dump"], word["until"]))
        elif "retire" in word:
            self._wish = word["retire"]
        elif not self._is_busy and not self._requests:
            pass  # the dump that it was meant for has ended
        elif "until" in word:
            self._until = word["until"]
            self._set_alarm()
        elif "stop" in word:
            self._stop()

    def _set_alarm(self) -> None:
        if self._is_busy and (left_s := _left(self._until)) is not None:
            ring_in(left_s)

    def _stop(self, is_over: bool = False) -> None:
        """End the dump under way as a signal ends it; there will be no other if that `is_over`."""
        self._is_over = self._is_over or is_over
        is_news, self._is_stopped = not self._is_stopped, True
        if self._is_busy and is_news:
            signal.raise_signal(signal.SIGTERM)


class Answers:
    """The lines that go to the supervisor; a Progress for the dump under way.

    A supervisor that does not read cannot hold up a dump: what does not fit is left out, but for the end.
    """

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.set_blocking(self._fd, False)
        os.dup2(2, 1)  # what plug-ins print is not for the supervisor
        self._next_amount = 0.0

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def phase(self, name: str) -> None:
        """See Progress."""
        self.try_to_say({"phase": name})

    def amount(self, done: int, total: int) -> None:
        """See Progress."""
        now = time.monotonic()
        if now >= self._next_amount:
            self._next_amount = now + _AMOUNTS_EVERY_S
            self.try_to_say({"amount": [done, total]})

    def finding(self, finding: Finding) -> None:
        """See Progress."""
        self.try_to_say({"finding": finding.as_json()})

    def end(self, answer: Mapping[str, Any]) -> None:
        """Say how the dump ended."""
        left = memoryview(_line(answer))
        while left:
            select.select([], [self._fd], [])
            left = left[os.write(self._fd, left) :]

    def try_to_say(self, word: Mapping[str, Any]) -> None:
        """Say it, unless it is long or nobody reads."""
        line = _line(word)
        if len(line) <= select.PIPE_BUF:  # longer ones could be cut
            try:
                os.write(self._fd, line)
            except OSError:
                pass

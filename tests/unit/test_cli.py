"""The command line: what it imports, how it says what went wrong, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from crcli import app, errors, kernel
from crcli.app import COMMANDS, build_app
from crcli.cause import Cause
from crcli.cli.options import JsonOption
from crcli.cli.quick import quick
from crcli.config import DEFAULT_STORE, choose_cache, choose_store
from crcli.errors import (
    EXIT_CODES,
    CrcliError,
    DumpFailed,
    PreflightRefused,
    RestoreFailed,
    TreeState,
    UsageError,
)
from crcli.findings import Finding, Severity
from crcli.main import main
from crcli.pipeline.interrupts import Interrupted
from crcli.ui.progress import PlainLines
from crcli.ui.table import show_table
from crcli.ui.text import count, duration, json_text, printable, size
from tests.support.programs import spawn_python, then_wait

HEAVY = (
    *("boto3", "botocore", "obstore", "numpy", "rich", "pydantic", "yaml", "psutil", "google", "blake3"),
    "pluggy",
)
UNUSED = (
    {"boto3", "botocore", "obstore", "numpy", "rich", "pydantic", "yaml", "psutil", "cuda"},
    {"core_entry", "fdinfo_entry", "tcp_stream_entry"},
    {"crcli.gpu", "crcli.notice", "crcli.store.s3", "crcli.pipeline.gpu", "crcli.pipeline.pager"},
    {"crcli.memory.weights.match", "crcli.memory.weights.cache", "crcli.criu.log", "crcli.criu.causes"},
)
"""What a dump into a directory, or a restore out of one, does without until CRIU is called, or altogether."""

ROOT = Path(__file__).parents[2]

raised: BaseException = RuntimeError()
"""What the command `boom` of these tests raises."""


def boom(as_json: JsonOption = False) -> None:
    """A command that fails."""
    raise raised


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the command `ls` raise what the test gives it, and return its exit code."""
    monkeypatch.setitem(COMMANDS, "ls", (f"{__name__}:boom", "fails"))

    def fail(error: BaseException, *options: str) -> int:
        monkeypatch.setattr(sys.modules[__name__], "raised", error)
        return main(["ls", *options])

    return fail


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests."""
    for name in ("CRCLI_STORE", "CRCLI_CONFIG", "CRCLI_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def run(*arguments: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "crcli", *arguments], capture_output=True, text=True, cwd=ROOT, **popen
    )


def one_error(text: str) -> dict[str, Any]:
    """The error that stdout consists of."""
    parsed = json.loads(text)
    assert list(parsed) == ["error"]
    assert list(parsed["error"]) == [
        "code",
        "message",
        "hint",
        "state",
        "findings",
        "cause",
        "criu",
        "retry",
        "log",
    ]
    found: dict[str, Any] = parsed["error"]
    return found


# --- start -------------------------------------------------------------------------------------------------


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a command line imports, by their first names, and crcli's by their full ones; and
    those of CRIU's messages that it has made classes of."""
    code = (
        "import sys\nfrom crcli.main import main\n"
        f"code = main({list(arguments)!r})\n"
        "made = vars(sys.modules.get('crcli.criu.messages', sys))\n"
        "print('\\0'.join([*sys.modules, *made]), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    names = done.stderr.rstrip("\n").rpartition("\n")[2].split("\0")
    return {name if name.startswith("crcli") else name.partition(".")[0] for name in names}


def test_help_imports_nothing_heavy() -> None:
    """`crcli --help` imports no command, no pipeline, and none of the libraries that they need."""
    loaded = loaded_by("--help")
    assert not loaded.intersection(HEAVY)
    assert not any(name.startswith(("crcli.cli", "crcli.store", "crcli.criu")) for name in loaded)
    assert "crcli.pipeline.dump" not in loaded


@pytest.mark.parametrize("command", ["weights", "cache", "lease"])
def test_help_of_commands_of_a_command_is_whole(command: str) -> None:
    """Each stands there with a whole sentence."""
    help_text = " ".join(run(command, "--help").stdout.split())
    group = import_module(f"crcli.cli.{command}").app
    assert group.registered_commands
    for one in group.registered_commands:
        sentence = " ".join((one.callback.__doc__ or "").partition("\n\n")[0].split())
        assert f" {one.name} {sentence}" in help_text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_no_pipeline(command: str) -> None:
    """`crcli COMMAND --help` imports that command's module and nothing that it would need to work."""
    loaded = loaded_by(command, "--help")
    assert {name for name in loaded if name.startswith("crcli.cli.")} <= {
        COMMANDS[command][0].partition(":")[0],
        "crcli.cli.dumping",
        "crcli.cli.keeping",
        "crcli.cli.options",
        "crcli.cli.quick",
        "crcli.cli.restoring",
        "crcli.cli.stores",
    }
    assert not loaded.intersection(set(HEAVY) - {"blake3"})


def test_a_directory_store_does_not_pay_for_s3() -> None:
    """Listing a directory store imports neither boto3 nor numpy nor rich."""
    assert not loaded_by("ls", "--store", "/nonexistent/store").intersection(set(HEAVY) - {"blake3"})


def test_a_restore_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """A restore is ready to read an image before any client, GPU, pager or CRIU message was imported."""
    (tmp_path / "store").mkdir()
    loaded = loaded_by("restore", "nothing", "--store", f"file://{tmp_path}/store")
    assert "crcli.pipeline.restore" in loaded
    assert not loaded.intersection(set().union(*UNUSED))
    assert not loaded.intersection({"crcli.pipeline.dump", "crcli.plugins.spec", "concurrent", "logging"})


def test_a_dump_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """A dump has looked at a tree before any client, GPU, index of weights or CRIU image was imported."""
    with spawn_python(then_wait()) as program:
        loaded = loaded_by("dump", str(program.pid), "--dry-run", "--store", f"file://{tmp_path}/store")
    assert {"crcli.pipeline.dump", "crcli.memory.sample"} <= loaded
    assert not loaded.intersection(set().union(*UNUSED) - {"crcli.criu.log"})
    assert not loaded.intersection({"crcli.pipeline.restore", "crcli.plugins.spec", "dataclasses"})


def test_records_are_structs() -> None:
    """No module makes dataclasses, whose making is slow, but those that plug-ins are given."""
    makes = [path for path in (ROOT / "crcli").rglob("*.py") if "from dataclasses import" in path.read_text()]
    assert [path.name for path in makes] == ["spec.py"]


def test_every_command_and_option_is_explained() -> None:
    """Each command opens with a sentence, and each of its parameters has a help text."""
    app = build_app()
    with app.make_context("crcli", ["ls"]) as context:
        for name, (_, line) in COMMANDS.items():
            command = app.get_command(context, name)
            assert line.endswith("."), name
            assert command.help.strip(), name
            assert [p.name for p in command.params if not getattr(p, "help", "")] == [], name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints it."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("crcli ")


# --- usage -------------------------------------------------------------------------------------------------


def test_no_arguments_show_the_help() -> None:
    """`crcli` alone explains itself, and ends as a wrong usage does."""
    done = run()
    assert done.returncode == 2
    assert "dump" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["dump"],
        ["dump", "abc"],
        ["dump", ""],
        ["dump", "1\n2"],
        ["dump", "1_0"],
        ["dump", "+1"],
        ["dump", "1", "--no-such-option"],
        ["dump", "9" * 5000],
        ["dump", "1", "--pre-copy", "9" * 5000],
        ["check", "9" * 5000],
        ["restore", "x", "--signal", "9" * 5000],
        ["dump", "1", "--leave-running", "--leave-stopped"],
        ["dump", "1", "--deadline", "-1"],
        ["dump", "1", "--deadline", "5s"],
        ["watch", "1", "--grace", "inf"],
        ["watch", "1", "--keep", "-1"],
        ["dump", "1", "--deadline", "nan"],
        ["dump", "1", "--notify-wait", "inf"],
        ["dump", "1", "--include", ""],
        ["gc", "--grace", "nan"],
        ["watch", "1", "--reserve", "nan"],
        ["dump", "1", "--pre-copy", "0"],
        ["dump", "1", "--pre-copy", "many"],
        ["restore", "x", "--tcp", "sometimes"],
        ["restore", "x", "--lazy", "--eager"],
        ["restore", "no/such name"],
        ["restore", "x@yesterday"],
        ["restore", "x@"],
        ["rm", "/x"],
        ["show", "s3://x"],
        ["show", "x", "--store", "relative/path"],
        ["gc", "--store", "ftp://host/path"],
        ["ls", "../x"],
        ["cp", "x"],
        ["dmup", "1"],
    ],
    ids=lambda words: " ".join(words)[:80],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line ends with 2: in words on stderr, or as one JSON object on stdout."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("crcli: ")) == ("", 1)
    assert main([*arguments, "--json"]) == 2
    said = capsys.readouterr()
    assert said.err == ""
    assert one_error(said.out)["code"] == "usage"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dump", "", "--json"], "PID is empty"),
        (["dump", "12\n34"], "no quotes around $(…)"),
        (["dump", "agent"], "pgrep"),
        (["dump", "1", "--deadline", "5s"], "'--deadline': it takes a number of seconds"),
        (["watch", "1", "--keep", "few"], "'--keep': it takes a whole number"),
        (["dump", "1", "--name"], "crcli dump --help"),
        (["cache", "ls", "--no-such-option"], "crcli cache ls --help"),
        (["dump", "1", "--include", "--leave-running"], "--include has no value"),
        (["run", "--name", "x", "--report", "--every", "5m"], "--report has no value"),
        (["rm", "x@"], "no id after its @"),
        (["rm", "/x"], "a variable with the store's URL"),
    ],
    ids=lambda words: " ".join(words)[:80],
)
def test_wrong_usage_is_explained(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with a word is said in words of crcli's, and where there is more to read."""
    assert main(arguments) == 2
    assert said in "".join(capsys.readouterr())


def test_a_pid_may_stand_between_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    """As `ps -o pid=` prints it."""
    assert main(["dump", "  4194304 "]) == PreflightRefused.exit_code
    assert "there is no process 4194304" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--variable", "A=B", "--", "true"], ["--", ""]])
def test_a_job_that_cannot_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A variable with its value, or a command without a name, is wrong usage before a store is looked at."""
    assert main(["run", "--name", "x", "--store", "/proc/nowhere", *words]) == 2
    assert capsys.readouterr().err.startswith("crcli: ")


def test_the_report_of_a_run_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    """Wrong usage is written there as well: one of an earlier run does not stand for this."""
    report = tmp_path / "report"
    report.write_text('{"end": "ended"}')
    for words in (["--every", "often"], ["--cpu-baseline", "/nonexistent"], ["--store", "x"]):
        assert main(["run", "--name", "x", "--report", str(report), *words, "--", "true"]) == 2
        assert words[1] in one_error(report.read_text())["message"]


def test_a_relative_path_in_a_folder_that_was_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It means nothing: that is said, and is no bug."""
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    for words in (["dump", "1", "--include", "x"], ["ls", "--store", "x"]):
        assert main(words) == 2
        assert "was removed" in capsys.readouterr().err
    assert main(["dump", "4194304", "--include", "/x"]) == PreflightRefused.exit_code


def test_a_misspelt_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command names the one that may have been meant."""
    main(["restor"])
    assert "crcli restore" in capsys.readouterr().err


# --- errors ------------------------------------------------------------------------------------------------


def all_errors() -> list[type[CrcliError]]:
    """Every class of error."""
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, CrcliError)]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_errors_end_with_their_exit_codes(
    kind: type[CrcliError], failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each error ends with its documented exit code, its message and hint on stderr, or as JSON on stdout."""
    error = kind("it broke", hint="mend it")
    assert failing(error) == error.exit_code
    assert error.exit_code in EXIT_CODES
    said = capsys.readouterr()
    assert said.out == ""
    assert "crcli: it broke" in said.err and "Hint: mend it" in said.err
    assert failing(error, "--json") == error.exit_code
    assert one_error(capsys.readouterr().out) == {
        "code": kind.code,
        "message": "it broke",
        "hint": "mend it",
        "state": "untouched",
        "findings": [],
        "cause": "",
        "criu": "",
        "retry": None,
        "log": "",
    }


@pytest.mark.parametrize(
    ("retry", "said"),
    [
        (True, "Trying again can help."),
        (False, "Trying again as it is will not help."),
        (None, "CRIU said: what CRIU said"),
    ],
)
def test_errors_say_why_criu_failed(
    retry: bool | None, said: str, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is known of CRIU's part comes with an error: its words, its log, whether to try again."""
    cause = Cause("pid-taken", "what CRIU said", "it broke", "mend it", retry, "/var/log/whole.log")
    error = RestoreFailed("it broke", hint="mend it", cause=cause)
    failing(error)
    text = capsys.readouterr().err
    assert said in text and "CRIU said: what CRIU said" in text and "whole log: /var/log/whole.log" in text
    assert ("Trying again" in text) == (retry is not None)
    failing(error, "--json")
    shown = one_error(capsys.readouterr().out)
    assert (shown["cause"], shown["criu"]) == ("pid-taken", "what CRIU said")
    assert (shown["retry"], shown["log"]) == (retry, "/var/log/whole.log")


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (TreeState.RUNNING, 11),
        (TreeState.UNTOUCHED, 11),
        (TreeState.STOPPED, 12),
        (TreeState.DEAD, 12),
    ],
)
def test_a_failed_dump_says_what_the_tree_does(
    state: TreeState, code: int, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code of a failed dump tells a tree that runs from one that does not, and so do the words."""
    assert failing(DumpFailed("it broke", state=state)) == code
    assert "The tree " in capsys.readouterr().err


def test_blockers_are_shown(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Findings that stop a dump stand below its message, and whole in the JSON."""
    first = Finding("one", Severity.BLOCKER, "the first thing", {"pid": 1}, remedy="end it")
    second = Finding("two", Severity.BLOCKER, "the second thing", remedy="end that too")
    error = PreflightRefused("it cannot be dumped: the first thing", findings=(first, second))
    failing(error)
    said = capsys.readouterr().err
    assert said.count("the first thing") == 1
    assert "the second thing (end that too)" in said
    failing(error, "--json")
    assert one_error(capsys.readouterr().out)["findings"] == [first.as_json(), second.as_json()]


def test_bugs_end_with_1(
    failing: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that nobody expected is one line with its place; CRCLI_DEBUG adds the traceback."""
    assert failing(KeyError("lost")) == 1
    said = capsys.readouterr().err
    assert "crcli itself failed: KeyError: 'lost' (test_cli.py:" in said
    assert "Traceback" not in said
    assert failing(KeyError("lost"), "--json") == 1
    assert one_error(capsys.readouterr().out)["code"] == "internal"
    monkeypatch.setenv("CRCLI_DEBUG", "1")
    assert failing(KeyError("lost")) == 1
    assert "Traceback" in capsys.readouterr().err


INTERRUPTED = {
    "while what prints is imported": (
        "import builtins, crcli.__main__ as start\n"
        "before = builtins.__import__\n"
        "def importing(name, *rest, **words):\n"
        "    if name == 'crcli.ui.output' and not os.path.exists(once):\n"
        "        open(once, 'w').close(); raise KeyboardInterrupt\n"
        "    return before(name, *rest, **words)\n"
        "builtins.__import__ = importing\n"
    ),
    "after the answer": (
        "import crcli.__main__ as start\n"
        "from crcli.ui import reports\n"
        "before = reports.show_json\n"
        "def show(data):\n    before(data); raise KeyboardInterrupt\n"
        "reports.show_json = show\n"
    ),
}


@pytest.mark.parametrize("when", INTERRUPTED)
def test_an_interrupt_is_answered_once(when: str, tmp_path: Path) -> None:
    """However early or late Ctrl-C comes: one JSON object, no traceback."""
    words = ["crcli", "plugins", "--json"]
    code = (
        f"import os, sys\nonce, sys.argv = {str(tmp_path / 'once')!r}, {words!r}\n"
        f"{INTERRUPTED[when]}sys.exit(start.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "")
    assert len(json.loads(done.stdout)) >= 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Interrupted(15), 143)])
def test_signals_end_with_their_number(
    error: BaseException, code: int, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C and SIGTERM end without a traceback, with the exit code that shells give them."""
    assert failing(error) == code
    assert "Traceback" not in capsys.readouterr().err
    assert failing(error, "--json") == code
    assert one_error(capsys.readouterr().out)["code"] == "interrupted"


def test_ctrl_c_while_it_is_imported() -> None:
    """Is an interrupt like any other: one JSON object, no traceback, 130."""
    code = """if True:
        import sys
        from crcli.__main__ import main
        class Interrupting:
            def find_spec(self, name, *_):
                if name == "typer":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        sys.argv = ["crcli", "ls", "--json"]
        sys.exit(main())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "")
    assert one_error(done.stdout)["code"] == "interrupted"


def test_text_from_outside_cannot_steer_the_terminal(
    failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters in a message are written out."""
    failing(UsageError("no process named \x1b]0;owned\x07\u202e"))
    said = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07\\u202e" in said
    assert "\x1b" not in said


def test_a_reader_that_goes_away() -> None:
    """`crcli --help | head -0` says nothing about broken pipes."""
    code = "exec 3>&1; ${PYTHON} -m crcli --help 2>&3 | true"
    done = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("doctor --help | true", 141, ""),
        ("plugins >/dev/full", 1, "could not be written"),
        ("plugins --json >/dev/full", 1, "could not be written"),
        ("show nobody --store /nowhere --json | true", 31, ""),
        ("show nobody --store /nowhere --json >/dev/full", 31, "could not be written"),
        ("cache ls >/dev/full", 1, "could not be written"),
        ("cache clear >/dev/full", 0, "could not be written"),
        ("plugins >&-", 0, ""),
        ("plugins --json <&- >&- 2>&-", 0, ""),
        ("show nobody --store /nowhere 2>/dev/full", 31, ""),
    ],
)
def test_output_that_is_lost(line: str, code: int, said: str, tmp_path: Path) -> None:
    """A stream that is full or closed is no bug: the exit code stays, or says that something is missing."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m crcli {line}"],
        capture_output=True,
        text=True,
        env=os.environ | {"CRCLI_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
    )
    assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (code, True, bool(said)), done


def test_a_stream_that_cannot_show_a_character_shows_its_number() -> None:
    """Output in another encoding than UTF-8 is never an error."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from crcli.ui.output import Output; Output.installed(); print('\\u2026 \\udcff')",
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
    )
    assert done.stdout == b"\\u2026 \\udcff\n", done


# --- settings ----------------------------------------------------------------------------------------------


def test_stores_come_from_the_option_then_the_environment_then_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command line wins over $CRCLI_STORE, that over the file, that over the default."""
    assert choose_store(None).url == DEFAULT_STORE
    file = tmp_path / ".config" / "crcli" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("store: s3://bucket/from-file\nendpoint_url: http://localhost:9000\n")
    chosen = choose_store(None)
    assert (chosen.url, chosen.endpoint_url, chosen.source) == (
        "s3://bucket/from-file",
        "http://localhost:9000",
        str(file),
    )
    monkeypatch.setenv("CRCLI_STORE", "file:///from/environment")
    chosen = choose_store(None)
    assert (chosen.url, chosen.endpoint_url) == ("file:///from/environment", None)
    assert choose_store("/from//option/").url == "file:///from/option"
    assert choose_store("s3://b/p", "http://other:1").endpoint_url == "http://other:1"


def test_an_empty_store_is_not_the_default(capsys: Any) -> None:
    """`--store "$UNSET"` is wrong usage: images would go to this host's own disk."""
    assert main(["dump", str(os.getpid()), "--store", ""]) == 2
    assert "--store is empty" in capsys.readouterr().err


def all_options() -> list[tuple[list[str], str, list[str]]]:
    """Every option that takes a value, behind the words of its command, and the words that this must have."""
    group = build_app()
    found: list[tuple[list[str], str, list[str]]] = []

    def look(command: Any, words: list[str]) -> None:
        if hasattr(command, "list_commands"):
            for name in command.list_commands(None):
                look(command.get_command(None, name), [*words, name])
            return
        arguments = [
            "1" for param in command.params if param.param_type_name == "argument" and param.required
        ]
        for param in command.params:
            if param.param_type_name == "option" and not param.is_flag:
                others = [
                    one for one in command.params if one is not param and one.param_type_name == "option"
                ]
                options = [word for one in others if one.required for word in (one.opts[0], "1")]
                found.append((words, param.opts[0], [*options, *arguments]))

    look(group, [])
    return found


@pytest.mark.parametrize("words,option,needed", all_options())
def test_what_is_empty_is_wrong_usage(words: list[str], option: str, needed: list[str], capsys: Any) -> None:
    """`--name "$UNSET"` is refused before anything is done, as is every other option."""
    assert main([*words, option, "", *needed]) == 2
    assert main([*words, f"{option}=", *needed]) == 2
    assert option in capsys.readouterr().err


def test_an_empty_word_is_no_name_of_an_image(capsys: Any) -> None:
    """Nor does it stand for all images; a command that is run may have one."""
    assert main(["ls", ""]) == 2
    assert "NAME is empty" in capsys.readouterr().err
    assert main(["cp", "", "/tmp/b"]) == main(["cp", "a", ""]) == main(["weights", "index", ""]) == 2
    command = build_app().get_command(None, "run")
    with command.make_context("run", ["--name", "job", "--", "echo", ""]) as context:
        assert list(context.params["command"]) == ["echo", ""]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "x" * 129], "at most 128"),
        (["restore", "file:///somewhere/"], "'file:///somewhere/' names no image"),
        (["show", "@20260131T235959123-0a1b2c"], "names no image"),
        (["ls", "file:///somewhere"], "--store"),
        (["weights", "ls", "/no/such/path"], "there is nothing at /no/such/path"),
        (["weights", "ls", "*.safetensors.none"], "there is nothing at *.safetensors.none"),
        (["weights", "push", "/no/such/path"], "named by path"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    """Its length, a URL without a name, a store or a file in its place."""
    assert main([*words, "--store", f"file://{tmp_path}/store"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["index", "push", "ls"])
def test_files_too_small_for_weights_are_not_passed_over(command: str, tmp_path: Path, capsys: Any) -> None:
    """What was named and cannot be meant is wrong usage: a folder without such files, too."""
    (tmp_path / "file").write_bytes(bytes((1 << 16) - 1))
    assert main(["weights", command, str(tmp_path / "file")]) == 2
    assert main(["weights", command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("there is no file of 64 KiB or more") == 2


def test_an_image_by_its_path_is_no_file_of_weights(tmp_path: Path, capsys: Any) -> None:
    """`weights ls` takes the path of an image in a folder as well."""
    (tmp_path / "images").mkdir()
    assert main(["weights", "ls", f"{tmp_path}/job"]) == 31
    assert f"the store file://{tmp_path} has no image named job" in capsys.readouterr().err


def test_a_wrong_setting_is_said_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Who typed no store has to know which variable or file names it."""
    monkeypatch.setenv("CRCLI_STORE", "nowhere")
    assert main(["ls"]) == 2
    assert "$CRCLI_STORE: not the URL of a store" in capsys.readouterr().err
    assert main(["ls", "--store", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("crcli: not the URL of a store")
    monkeypatch.delenv("CRCLI_STORE")
    monkeypatch.setenv("CRCLI_CONFIG", path := str(tmp_path / "config.yaml"))
    Path(path).write_text("store: nowhere\ncache: {size: much}\n")
    assert main(["ls"]) == main(["cache", "ls"]) == 2
    said = capsys.readouterr().err
    assert f"{path}: not the URL of a store" in said and f"`size` in {path}: 'much' is not a size" in said
    monkeypatch.setenv("CRCLI_CACHE_SIZE", "more")
    assert main(["cache", "ls"]) == 2
    assert "$CRCLI_CACHE_SIZE: 'more' is not a size" in capsys.readouterr().err


def test_an_index_of_weights_that_cannot_be_kept_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """To keep it is all that `weights index` is for."""
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    monkeypatch.setenv("CRCLI_CACHE_DIR", "/proc/nowhere")
    assert main(["weights", "index", str(tmp_path / "file")]) == 40
    assert "CRCLI_CACHE_DIR" in capsys.readouterr().err


def test_an_s3_server_without_a_store_is_no_folder_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--endpoint-url` with the store forgotten is refused; with a folder that somebody named it is idle."""
    with pytest.raises(UsageError, match="no store is named"):
        choose_store(None, "http://s3:9000")
    assert choose_store(None, "http://s3:9000", endpoint_is_for_another=True).url == DEFAULT_STORE
    assert choose_store("/a/folder", "http://s3:9000").url == "file:///a/folder"
    monkeypatch.setenv("CRCLI_STORE", "file:///a/folder")
    assert choose_store(None, "http://s3:9000").url == "file:///a/folder"


def test_no_settings_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/null as the configuration file says that there is to be none."""
    monkeypatch.setenv("CRCLI_CONFIG", "/dev/null")
    assert choose_store(None).source == "the default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store: [a, b]", "must hold lines"),
        ("- store", "must hold lines"),
        ("stroe: s3://b/p", "stroe"),
        ("store: {", "cannot read"),
    ],
)
def test_wrong_settings_are_named(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A configuration file that makes no sense is an error that names the file."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    monkeypatch.setenv("CRCLI_CONFIG", str(file))
    with pytest.raises(UsageError, match=message) as found:
        choose_store(None)
    assert str(file) in found.value.message


def test_sizes_and_folders_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size is one of any length; a folder is the same from wherever crcli is called."""
    monkeypatch.setenv("CRCLI_CACHE_SIZE", "9" * 400)
    assert (choose_cache().limit or 0) >= 10**15
    monkeypatch.setenv("CRCLI_CACHE_DIR", "cache")
    with pytest.raises(UsageError, match="absolute"):
        choose_cache()


def test_an_empty_file_is_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty configuration file leaves the default; one that is named but not there is an error."""
    file = tmp_path / "settings.yaml"
    monkeypatch.setenv("CRCLI_CONFIG", str(file))
    with pytest.raises(UsageError):
        choose_store(None)
    file.write_text("# nothing yet\n")
    assert choose_store(None).url == DEFAULT_STORE


# --- what people read --------------------------------------------------------------------------------------


def test_sizes_and_times() -> None:
    """Sizes and times are short, with three digits or so."""
    assert [size(n) for n in (0, 1023, 1024, 10 << 20, 300 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "10.0 MiB",
        "300 MiB",
        "5.0 TiB",
    ]
    assert [duration(ms) for ms in (0.4, 88, 1500, 200_000)] == ["0 ms", "88 ms", "1.50 s", "3.3 min"]
    assert [count(1, "pack"), count(2, "pack"), count(2, "process")] == ["1 pack", "2 packs", "2 processes"]
    assert printable("a\tb\nc\r\x00") == "a\tb\nc\\r\\x00"


def test_json_of_names_that_are_no_text() -> None:
    """What is in no encoding is marked; the JSON is ASCII, and has no half of a character."""
    text = json_text({"command": "a\udcff\u00e4\U0001f600\\udcff"})
    assert text.isascii() and json.loads(text) == {"command": "a\ufffd\u00e4\U0001f600\\udcff"}
    assert json_text({"a": 1.5, "b": None}) == '{"a": 1.5, "b": null}'


def test_tables_are_plain_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe a table is aligned columns, never cut, with control characters written out."""
    show_table(("NAME", "SIZE"), [("a" * 200, "1"), ("b\x1b[2J", "22")], right=("SIZE",))
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [206, 206, 206]
    assert lines[2].startswith("b\\x1b[2J")


def in_terminal(code: str) -> str:
    """What Python code writes to a terminal that both its output streams are."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT
    ) as process:
        os.close(slave)
        said = b""
        try:
            while piece := os.read(master, 4096):
                said += piece
        except OSError:
            pass  # how Linux says that the other side was closed
        os.close(master)
    assert process.returncode == 0, said.decode()
    return said.decode()


def test_tables_on_a_terminal_take_text_literally() -> None:
    """rich draws tables on terminals, and takes nothing in them for its markup."""
    said = in_terminal("from crcli.ui.table import show_table; show_table(('NAME',), [('[red]x[/red]',)])")
    assert "[red]x[/red]" in said


@pytest.mark.parametrize(("width", "is_broken"), [(120, True), (80, False), (30, False)])
def test_what_is_copied_from_a_table_stays_whole_on_a_terminal(width: int, is_broken: bool) -> None:
    """Long text in the last column is broken into lines where it has room for that; nothing else is."""
    row = ("agent@20261126T024446670-3f0181", "2026-11-26 12:19:19", "20.6 MiB")
    said = in_terminal(
        f"import os; os.environ['COLUMNS'] = '{width}'\n"
        "from crcli.ui.table import show_table\n"
        f"show_table(('IMAGE', 'CREATED', 'MEMORY', 'COMMAND'), [({row}) + ('x' * 90,)], right=('MEMORY',))"
    )
    assert "  ".join(row) in said and ("x" * 90 not in said) == is_broken


def test_progress_on_a_terminal() -> None:
    """What takes over a second shows its phase and amount on a line that is gone at the end."""
    said = in_terminal(
        "import time\n"
        "from crcli.ui.progress import showing\n"
        "with showing(False) as progress:\n"
        "    progress.phase('storing'); progress.amount(1 << 20, 4 << 20); time.sleep(1.5)\n"
    )
    assert "storing" in said and "1.0 MiB of 4.0 MiB (25 %)" in said
    assert said.endswith("\r\x1b[K")


def test_progress_of_quick_work_is_invisible() -> None:
    """What takes less than a second shows nothing, on a terminal or elsewhere."""
    code = "from crcli.ui.progress import showing\nwith showing(False) as progress: progress.phase('storing')"
    assert in_terminal(code) == ""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).stderr == b""


def test_progress_in_a_log() -> None:
    """Where nobody watches, a phase that lasts is a line too, though it began within the first second."""
    code = (
        "import time\nfrom crcli.ui.progress import showing\n"
        "with showing(False) as progress:\n"
        "    progress.phase('storing'); progress.amount(1 << 20, 4 << 20); time.sleep(2.5)\n"
        "    progress.phase('ending')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    first, second = done.stderr.splitlines()
    assert first.startswith("crcli: storing (") and first.endswith("1.0 MiB of 4.0 MiB (25 %)")
    assert second.startswith("crcli: ending (")


def test_findings_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody watches, what changes is a line, with what crcli does about it; notes are left out."""
    lines = PlainLines()
    lines.finding(Finding("x", Severity.CHANGE, "a thing is lost", action="goes on"))
    lines.finding(Finding("y", Severity.NOTE, "nothing much"))
    lines.close()
    assert capsys.readouterr().err == "change: a thing is lost [crcli goes on]\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--port", "80"),
        ("--port", "80=0"),
        ("--port", "80=65536"),
        ("--port", "80=-1"),
        ("--port", "80=80"),
        ("--port", "80=81", "--port", "80=82"),
        ("--port", "80=82", "--port", "81=82"),
        ("--signal", "KILL"),
        ("--signal", "19"),
        ("--signal", "0"),
        ("--signal", ""),
        ("--signal", "SIGNOTHING"),
        ("--root", "/dev/null"),
        ("--root", "/", "--pid-namespace", "host"),
    ],
)
def test_nonsense_for_a_restore_is_wrong_usage(options: tuple[str, ...], capsys: Any) -> None:
    """Options that no restore could follow are named, before any store is looked at."""
    assert main(["restore", "nobody", "--store", "file:///nowhere", *options]) == 2
    assert options[-2] in capsys.readouterr().err


def test_real_time_signals_have_names_too() -> None:
    """What a tree died of, or asked for, is said whichever signal it is."""
    assert kernel.signal_name(signal.SIGTERM) == "SIGTERM"
    assert kernel.signal_name(signal.SIGRTMIN + 3) == "SIGRTMIN+3"


# --- a dump or a restore without typer ---------------------------------------------------------------------


class _Asked:
    """Notes what a dump or a restore is asked for, instead of doing it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: tuple[object, ...] = ()
        monkeypatch.setattr("crcli.cli.restoring.bring_back", self.note)
        monkeypatch.setattr("crcli.cli.restore.bring_back", self.note)
        monkeypatch.setattr("crcli.cli.dumping.take", self.note)
        monkeypatch.setattr("crcli.cli.dump.take", self.note)

    def note(self, *asked: object, **how: bool) -> int:
        self.found = (asked, how)
        return 0


@pytest.mark.parametrize(
    "words",
    [
        ["restore", "agent"],
        ["restore", "agent@20261127T000000000-abcdef"],
        ["restore", "--json", "agent", "--store", "file:///a"],
        ["restore", "file:///b/agent", "--store", "file:///a", "--store", "file:///c"],
        [
            "restore",
            "agent",
            "--wait",
            "--lazy",
            "--endpoint-url",
            "http://here:1",
            "--store",
            "s3://bucket/x",
        ],
        ["restore", "--eager", "--eager", "agent"],
        ["dump", "17"],
        ["dump", "--json", "017", "--name", "agent", "--store", "file:///a"],
        [
            "dump",
            "17",
            "--leave-running",
            "--no-trial",
            "--endpoint-url",
            "http://here:1",
            "--store",
            "s3://b/x",
        ],
        ["dump", "--leave-stopped", "17", "--name", "a", "--name", "b"],
    ],
)
def test_the_same_is_asked_for_with_and_without_typer(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command line that is read without typer means what typer makes of it."""
    asked = _Asked(monkeypatch)
    command = quick(words)
    assert command is not None
    assert command() == 0
    ours, asked.found = asked.found, ()
    assert app.run(words, as_json=False) == 0
    assert ours == asked.found


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["ls"],
        ["restore"],
        ["restore", "--help"],
        ["restore", "agent", "-h"],
        ["restore", "agent", "other"],
        ["restore", "agent", "--store"],
        ["restore", "agent", "--store", "--json"],
        ["restore", "agent", "--store", ""],
        ["restore", "agent", "--store=file:///a"],
        ["restore", "agent", "--lazy", "--eager"],
        ["restore", "agent", "--tcp", "close"],
        ["restore", "--", "agent"],
        ["restore", "agent", "--nosuch"],
        ["dump", "--help"],
        ["dump", "17", "18"],
        ["dump", "agent"],
        ["dump", "-17"],
        ["dump", "1_7"],
        ["dump", "17", "--leave-running", "--leave-stopped"],
        ["dump", "17", "--name", ""],
        ["dump", "17", "--dry-run"],
        ["dump", "17", "--deadline", "30"],
    ],
)
def test_whatever_else_is_left_to_typer(words: list[str]) -> None:
    """Other commands and options, help and mistakes."""
    assert quick(words) is None


@pytest.mark.parametrize("more", [[], ["--tcp", "close"]], ids=["without typer", "with it"])
def test_a_restore_hears_signals_at_once(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However its command line is read: `--wait` passes them on for as long as the tree lives."""
    during: list[str] = []

    def look(*_: object, **__: object) -> int:
        during.extend(thread.name for thread in threading.enumerate())
        return 0

    monkeypatch.setattr("crcli.cli.restoring.bring_back", look)
    monkeypatch.setattr("crcli.cli.restore.bring_back", look)
    assert main(["restore", "agent", "--wait", "--store", "file:///a", *more]) == 0
    assert "bell" in during


def test_a_plain_restore_imports_no_typer() -> None:
    """That would take a quarter of the time in which a small tree is back."""
    loaded = loaded_by("restore", "nosuch", "--store", "file:///nosuch")
    assert "crcli.pipeline.restore" in loaded
    assert "typer" not in loaded

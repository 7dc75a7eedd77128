"""The plug-in door: what is found, what is called, and that nothing broken behind it stops a command."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crcli.errors import CrcliError, GuardRefused
from crcli.plugins import DumpTarget, load_hooks, names
from crcli.plugins.spec import Failure, failure_of

ROOT = Path(__file__).parents[2]
TARGET = DumpTarget(4711, (4711, 4712), "agent@20260101T000000000-abcdef", "file:///store", "killed")

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a plug-in: its name, and the Python text that it is."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delenv("CRCLI_NO_PLUGINS", raising=False)

    def do(name: str, code: str) -> None:
        module = f"plugin_of_{tmp_path.name.replace('-', '_')}_{name}"
        (place / f"{module}.py").write_text("from crcli.plugins import hookimpl\n" + textwrap.dedent(code))
        info = place / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{names.GROUP}]\n{name} = {module}\n")

    return do


# --- finding -----------------------------------------------------------------------------------------------


def test_without_plugins_nothing_is_paid() -> None:
    """Without plug-ins neither pluggy nor importlib.metadata is imported."""
    code = textwrap.dedent(
        """
        import sys
        before = set(sys.modules)
        from crcli.plugins.loader import load_hooks
        hooks = load_hooks()
        hooks.call("dump_frozen", target=None)
        assert "pluggy" not in sys.modules and "importlib.metadata" not in set(sys.modules) - before
        """
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_plugin_is_found_and_called(install: Install, tmp_path: Path) -> None:
    """An installed plug-in's hooks are called with the arguments that they ask for, by name."""
    install(
        "noter",
        f"""
        @hookimpl
        def crcli_dump_finished(report, target):
            open({str(tmp_path / "said")!r}, "a").write(f"{{target.pid}} {{report['outcome']}}\\n")

        @hookimpl
        def crcli_dump_frozen():
            open({str(tmp_path / "said")!r}, "a").write("frozen\\n")
        """,
    )
    hooks = load_hooks()
    hooks.call("dump_before_freeze", target=TARGET)
    hooks.call("dump_frozen", target=TARGET)
    hooks.call("dump_finished", target=TARGET, report={"outcome": "killed"})
    assert (tmp_path / "said").read_text() == "frozen\n4711 killed\n"
    assert hooks.findings == []
    (plugin,) = hooks.plugins
    assert (plugin.name, plugin.package, plugin.version) == ("noter", "noter", "1.5")
    assert plugin.hooks == ["crcli_dump_finished", "crcli_dump_frozen"]


def test_plugins_can_be_left_out(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRCLI_NO_PLUGINS=1 loads none of them."""
    install("noter", "raise RuntimeError('imported')")
    monkeypatch.setenv("CRCLI_NO_PLUGINS", "1")
    assert load_hooks().plugins == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_module", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def (", "SyntaxError"),
        ("@hookimpl\ndef crcli_dump_frozen(tree): pass", "PluginValidationError"),
        ("@hookimpl\ndef crcli_dump_thawed(): pass", "crcli_dump_thawed"),
        ("", "implements no hook"),
    ],
    ids=["import", "exit", "syntax", "argument", "unknown hook", "no hook"],
)
def test_a_broken_plugin_is_reported_and_stops_nobody(code: str, error: str, install: Install) -> None:
    """Whatever is wrong with one plug-in, it is a finding, and the others work."""
    install("broken", code)
    install("works", "@hookimpl\ndef crcli_dump_frozen(target): raise RuntimeError('called')")
    hooks = load_hooks()
    assert [bool(plugin.error) for plugin in hooks.plugins] == [True, False]
    assert error in hooks.plugins[0].error
    assert [finding.name for finding in hooks.findings] == ["plugin-broken"]
    hooks.call("dump_frozen", target=TARGET)
    assert hooks.findings[1].evidence == {"plugin": "works", "where": "dump_frozen"}


# --- calling -----------------------------------------------------------------------------------------------


def test_a_failing_hook_is_a_finding(install: Install) -> None:
    """What a hook raises is a finding with the plug-in's name; the next plug-in is called all the same."""
    install("a", "@hookimpl\ndef crcli_dump_before_freeze(target): raise ValueError('full')")
    install("b", "@hookimpl\ndef crcli_dump_before_freeze(target): raise SystemExit(1)")
    hooks = load_hooks()
    hooks.call("dump_before_freeze", target=TARGET)
    assert [finding.evidence["plugin"] for finding in hooks.findings] == ["a", "b"]
    assert "ValueError: full" in hooks.findings[0].message


REFUSES = (
    "from crcli.errors import GuardRefused\n@hookimpl\ndef {hook}(): raise GuardRefused('not tonight')\n"
)


@pytest.mark.parametrize("hook", ["dump_before_freeze", "restore_before"])
def test_a_plugin_may_refuse_before_anything_is_touched(hook: str, install: Install) -> None:
    """crcli's own error, raised by a `before` hook, is passed on with its exit code."""
    install("refuses", REFUSES.format(hook=f"crcli_{hook}"))
    with pytest.raises(GuardRefused, match="not tonight"):
        load_hooks().call(hook, target=TARGET)


def test_no_plugin_may_refuse_later(install: Install) -> None:
    """The same error from a hook that comes later is a finding like any other."""
    install("refuses", REFUSES.format(hook="crcli_dump_frozen"))
    hooks = load_hooks()
    hooks.call("dump_frozen", target=TARGET)
    assert [finding.name for finding in hooks.findings] == ["plugin-failed"]


def test_ctrl_c_is_not_the_plugins(install: Install) -> None:
    """KeyboardInterrupt passes through a hook: it belongs to the command."""
    install("slow", "@hookimpl\ndef crcli_dump_frozen(): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_hooks().call("dump_frozen", target=TARGET)


def test_failures_say_what_json_says() -> None:
    """A failure hook is told what --json says of the error, and what an unexpected one would be."""
    assert failure_of(GuardRefused("no", hint="go")) == Failure("guard-refused", "no", "go", "untouched", 20)
    assert failure_of(KeyError("x")).exit_code == 1
    assert failure_of(CrcliError("x")).code == "internal"


# --- our own: crcli-journal --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def journal_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that crcli-journal was installed into by pip, from a copy of its source."""
    import shutil

    folder = tmp_path_factory.mktemp("journal")
    source = shutil.copytree(
        ROOT / "plugins" / "crcli-journal",
        folder / "source",
        ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"),
    )
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def journal(journal_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The journal's file; the plug-in is installed for this process and those that it starts."""
    path = tmp_path / "log" / "journal.jsonl"
    monkeypatch.syspath_prepend(str(journal_site))
    monkeypatch.setenv("PYTHONPATH", str(journal_site))
    monkeypatch.setenv("CRCLI_JOURNAL", str(path))
    monkeypatch.delenv("CRCLI_JOURNAL_URL", raising=False)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_journal_is_listed(journal: Path) -> None:
    """`crcli plugins` shows the journal once it is installed."""
    done = subprocess.run(
        [sys.executable, "-m", "crcli", "plugins", "--json"], capture_output=True, text=True, cwd=ROOT
    )
    (plugin,) = json.loads(done.stdout)["plugins"]
    assert (plugin["name"], plugin["package"], plugin["error"]) == ("journal", "crcli-journal", "")
    table = subprocess.run(
        [sys.executable, "-m", "crcli", "plugins"], capture_output=True, text=True, cwd=ROOT
    )
    assert "crcli_dump_finished" in table.stdout


def test_the_journal_has_a_line_per_event(journal: Path) -> None:
    """Begin and end of a dump are a line each, with what matters at night."""
    hooks = load_hooks()
    hooks.call("dump_before_freeze", target=TARGET)
    hooks.call("dump_failed", target=TARGET, failure=failure_of(GuardRefused("no room", hint="make some")))
    begins, failed = lines_of(journal)
    assert (begins["event"], begins["pid"], begins["image"]) == ("dump-begins", 4711, TARGET.image)
    assert failed["event"] == "dump-failed"
    assert (failed["code"], failed["exit_code"], failed["state"]) == ("guard-refused", 20, "untouched")
    assert abs(failed["time"] - time.time()) < 10
    assert journal.stat().st_mode & 0o777 == 0o600


def test_a_journal_that_cannot_be_written_is_a_finding(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dump fails because of its journal."""
    monkeypatch.setenv("CRCLI_JOURNAL", "/dev/full")
    hooks = load_hooks()
    hooks.call("dump_before_freeze", target=TARGET)
    assert [finding.name for finding in hooks.findings] == ["plugin-failed"]


def test_the_journal_is_posted_too(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a URL each line is posted; a server that is not there is a finding, and the file has the line."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("CRCLI_JOURNAL_URL", f"http://127.0.0.1:{server.server_port}/")
        thread = Thread(target=server.serve_forever)
        thread.start()
        hooks = load_hooks()
        hooks.call("dump_before_freeze", target=TARGET)
        server.shutdown()
        thread.join()
    assert [line["event"] for line in posted] == ["dump-begins"]
    assert hooks.findings == []
    hooks.call("dump_finished", target=TARGET, report={"outcome": "killed", "findings": []})
    assert [finding.name for finding in hooks.findings] == ["plugin-failed"]
    assert [line["event"] for line in lines_of(journal)] == ["dump-begins", "dump-finished"]

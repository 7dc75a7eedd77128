"""Programs that learn of their dump and their restore: by crcli.notify, and by a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.crcli import ROOT, Crcli, assert_goes_on, counter, tree_of, wait_until
from tests.support.programs import Program, spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

AGENT = f"""
    import os, sys
    sys.path.insert(0, {str(ROOT)!r})
    from crcli import notify

    def say(word):
        return lambda: os.write(1, (word + "\\n").encode())  # at once: others write there, too

    notify.on_checkpoint(say("checkpoint"))
    notify.on_resume(say("resume"))
    notify.on_restore(say("restore"))
    """
WAITER = """
    os.write(1, b"ready\\n")
    while notify.wait_restored():
        os.write(1, b"waited\\n")
    """


def agent(more: str = WAITER) -> str:
    """The code of a program that prints what it is told."""
    return textwrap.dedent(AGENT) + textwrap.dedent(more)


def heard(program: Program, *words: str) -> None:
    """Assert that a program was told this, in this order, and nothing else."""
    expected = ["ready", *words]
    wait_until(lambda: len(program.output.splitlines()) >= len(expected), program.output)
    assert program.output.splitlines() == expected


def test_an_agent_hears_of_dumps_and_restores(crcli: Crcli) -> None:
    """Left running it resumes, killed and restored it is told so, here and in a pid namespace of its own."""
    with spawn_python(agent()) as program:
        crcli.dump(program.pid, "--leave-running")
        heard(program, "checkpoint", "resume")
        report = crcli.dump(program.pid)
        assert "notify" in report["phases"]
        heard(program, "checkpoint", "resume", "checkpoint")
        crcli.restore(report["image"])
        so_far = ("checkpoint", "resume", "checkpoint", "restore", "waited")
        heard(program, *so_far)
        again = crcli.dump(program.pid)["image"]
        crcli.restore(again, "--pid-namespace", "new")
        heard(program, *so_far, "checkpoint", "restore", "waited")


def test_an_agent_in_a_pid_namespace_is_dumped_again(crcli: Crcli) -> None:
    """A restored agent hears of the next dump and the next restore as it did of the first."""
    with spawn_python(agent()) as program:
        report = crcli.move(program.pid, "--pid-namespace", "new")
        heard(program, "checkpoint", "restore", "waited")
        crcli.move(report["host_pid"])
        heard(program, "checkpoint", "restore", "waited", "checkpoint", "restore", "waited")


def test_a_stopped_tree_hears_of_the_end_when_it_goes_on(crcli: Crcli) -> None:
    """After --leave-stopped the callbacks for going on run upon kill -CONT."""
    with spawn_python(agent()) as program:
        crcli.dump(program.pid, "--leave-stopped")
        heard(program, "checkpoint")
        os.kill(program.pid, signal.SIGCONT)
        heard(program, "checkpoint", "resume")


def test_a_dump_that_fails_is_over(crcli: Crcli, tmp_path: Path) -> None:
    """An agent that closed things for a dump opens them again when the dump fails."""
    with spawn_python(agent()) as program:
        (tmp_path / "criu").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "criu").chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CRCLI_CRIU", str(tmp_path / "criu"))
            assert crcli.dump(program.pid, code=11)["error"]["state"] == "running"
        heard(program, "checkpoint", "resume")


def test_a_slow_agent_is_not_waited_for(crcli: Crcli) -> None:
    """Past --notify-wait the dump goes on and says so; the callback ends after the restore."""
    more = """
        import time
        def slow():
            began = time.monotonic()
            while time.monotonic() - began < 1.5:
                time.sleep(0.01)
            print("done")
        notify.on_checkpoint(slow)
        """
    with spawn_python(agent(textwrap.dedent(more) + textwrap.dedent(WAITER))) as program:
        report = crcli.dump(program.pid, "--notify-wait", "0.1")
        assert [f["name"] for f in report["findings"] if f["name"].startswith("notify")] == ["notify-late"]
        crcli.restore(report["image"])
        heard(program, "checkpoint", "done", "restore", "waited")


@pytest.mark.parametrize("options", [("--notify-wait", "0"), ("--deadline", "9")])
def test_with_no_time_nobody_is_told(crcli: Crcli, options: tuple[str, ...]) -> None:
    """With no time to spare a dump announces itself to nobody; the restore is told all the same."""
    with spawn_python(agent()) as program:
        crcli.restore(crcli.dump(program.pid, *options)["image"])
        heard(program, "restore", "waited")


def test_what_an_agent_closes_is_not_looked_for(crcli: Crcli, tmp_path: Path) -> None:
    """Connections that a callback closes are in neither plan nor image; the agent makes new ones itself."""
    path = str(tmp_path / "service")
    code = """
        import socket, time
        peers = []
        def connect():
            unix = socket.socket(socket.AF_UNIX)
            unix.connect({path!r})
            peers[:] = [unix, socket.create_connection(("127.0.0.1", {port}))]
            for peer in peers:
                peer.sendall(b"hello\\n")
        def disconnect():
            for peer in peers:
                peer.close()
        connect()
        notify.on_checkpoint(disconnect)
        notify.on_restore(connect)
        """
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(path)
        unix.listen()
        code = textwrap.dedent(code).format(path=path, port=tcp.getsockname()[1])
        with spawn_python(agent(code + textwrap.dedent(WAITER))) as program:
            for service in (unix, tcp):
                service.settimeout(10)
                with service.accept()[0] as peer:
                    assert peer.recv(100) == b"hello\n"
            report = crcli.dump(program.pid)
            assert not [finding for finding in report["findings"] if "outside" in finding["name"]]
            crcli.restore(report["image"])
            for service in (unix, tcp):
                with service.accept()[0] as peer:
                    assert peer.recv(100) == b"hello\n"
            heard(program, "checkpoint", "restore", "waited")


def test_every_process_of_a_tree_hears(crcli: Crcli) -> None:
    """Parent and child with callbacks of their own are both told, each once."""
    more = """
        import os
        if os.fork() == 0:
            notify.on_checkpoint(say("child: checkpoint"))
            notify.on_restore(say("child: restore"))
        """
    with spawn_python(agent(textwrap.dedent(more) + textwrap.dedent(WAITER))) as program:
        wait_until(lambda: program.output.count("ready") == 2, "the child is late")
        crcli.move(program.pid)
        wait_until(lambda: program.output.count("waited") == 2, program.output)
        told = sorted(line for line in program.output.splitlines() if line not in ("ready", "waited"))
        assert told == ["checkpoint", "child: checkpoint", "child: restore", "restore"]


def test_a_false_board_does_no_harm(crcli: Crcli) -> None:
    """A program that never answers, and names a pipe that is full, is dumped and restored like any other."""
    code = """
        import os, struct
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while os.write(writer, bytes(4096)): pass
        except BlockingIOError: pass
        os.set_blocking(writer, True)
        for version in (1, 1, 7):
            fd = os.memfd_create("crcli-notify")
            os.write(fd, struct.pack("<8sIIIIII", b"crclinfy", version, writer, 2**32 - 1, 9, 9, 9))
        """
    with spawn_python(textwrap.dedent(code) + counter()) as program:
        report = crcli.dump(program.pid, "--notify-wait", "0.2")
        assert [f["name"] for f in report["findings"]].count("notify-late") == 2
        crcli.restore(report["image"])
        assert_goes_on(program)


def test_a_signal_is_sent_to_the_root(crcli: Crcli) -> None:
    """--signal reaches the root of the tree, once, and nobody else in it."""
    code = """
        import os, signal, time
        signal.signal(signal.SIGUSR2, lambda *_: print(f"signal in {role}"))
        role = "root" if os.fork() else "child"
        print("ready")
        while True:
            time.sleep(0.01)
        """
    with spawn_python(code) as program:
        wait_until(lambda: program.output.count("ready") == 2, "the child is late")
        image = crcli.dump(program.pid)["image"]
        crcli.restore(image, "--signal", "usr2")
        wait_until(lambda: "signal in" in program.output, "it got no signal")
        assert program.output.count("signal in") == program.output.count("signal in root") == 1
        crcli.restore(image, "--signal", str(int(signal.SIGUSR2)))
        wait_until(lambda: program.output.count("signal in root") == 2, "the copy got no signal")


def test_a_signal_that_kills_is_no_failed_restore(crcli: Crcli) -> None:
    """The signal comes after the look: the restore worked, and --wait ends with the tree's own code."""
    with spawn_python(then_wait()) as program:
        image = crcli.dump(program.pid)["image"]
        arguments = ("restore", image, "--store", crcli.store, "--json", "--wait", "--signal", "SIGTERM")
        report = crcli.run(*arguments, code=128 + signal.SIGTERM).json
        assert report["pid"] == program.pid


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plug-in that writes down what it is told of a restore; the file that it writes to."""
    site, said = tmp_path / "site", tmp_path / "said"
    info = site / "noter-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noter\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[crcli.plugins]\nnoter = noter\n")
    code = f"""
        import json, time
        from crcli.plugins import hookimpl

        def state(pid):
            for _ in range(1000):  # on a busy machine one may not have come to where it waits for CRIU
                if (state := open(f"/proc/{{pid}}/stat").read().split()[2]) != "R":
                    break
                time.sleep(0.001)
            return state

        def note(hook, target):
            states = {{pid: state(pid) for pid in target.host_pids.values()}}
            with open({str(said)!r}, "a") as file:
                file.write(json.dumps([hook, target.host_pids, states]) + "\\n")

        @hookimpl
        def crcli_restore_before(target): note("before", target)

        @hookimpl
        def crcli_restore_frozen(target): note("frozen", target)

        @hookimpl
        def crcli_restore_finished(target): note("finished", target)
        """
    (site / "noter.py").write_text(textwrap.dedent(code))
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", paths)
    yield said


def test_plugins_are_told_the_pids(crcli: Crcli, plugin: Path) -> None:
    """Hooks get the tree's pids and those of this host, one of them before an instruction has run."""
    code = """
        import os, time
        os.fork()
        print("ready")
        while True: time.sleep(0.01)
        """
    with spawn_python(code) as program:
        wait_until(lambda: program.output.count("ready") == 2, "the child is late")
        inside = [str(process.pid) for process in tree_of(program.pid)]
        report = crcli.move(program.pid, "--pid-namespace", "new")
        outside = [process.pid for process in tree_of(report["host_pid"])]
        lines = [json.loads(line) for line in plugin.read_text().splitlines()]
        pids = dict(zip(inside, outside, strict=True))
        assert [line[:2] for line in lines] == [["before", {}], ["frozen", pids], ["finished", pids]]
        assert set(lines[1][2].values()) <= {"t", "T", "S"} and report["host_pid"] == outside[0]

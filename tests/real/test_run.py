"""`crcli run`: jobs started, brought back, kept; what they read and write; who may have them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from blake3 import blake3

from crcli.image.container import VERSION
from crcli.process.tree import child_pids
from tests.support.crcli import Crcli, wait_until
from tests.support.jobs import Job, job, python_job, result_of_steps, steps

SHELL = ("--", "sh", "-c")


def to_the_end(crcli: Crcli, folder: Path, *arguments: str, code: int = 0) -> Job:
    """Run a job to its end."""
    with job(crcli, folder, *arguments) as one:
        one.end(code)
    return one


# --- a job by itself --------------------------------------------------------------------------------------


def test_a_job_writes_and_ends_as_without_us(crcli: Crcli, tmp_path: Path) -> None:
    """Output and errors come out where they should, and the exit code is the job's."""
    done = to_the_end(crcli, tmp_path / "1", *SHELL, "echo out; echo err >&2; exit 7", code=7)
    assert done.out == "out\n"
    assert "err\n" in done.err
    assert done.report["end"] == "ended" and done.report["begun"] == "fresh"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "multipathtcp=0"),
        ("gctrace=0", "gctrace=0,multipathtcp=0"),
        ("multipathtcp=2,gctrace=0", "multipathtcp=2,gctrace=0"),
    ],
)
def test_a_go_server_listens_so_that_it_can_be_saved(
    before: str | None, after: str, crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go listens with MPTCP, which CRIU cannot save, unless it is told otherwise; who has told it decides."""
    if before is None:
        monkeypatch.delenv("GODEBUG", raising=False)
    else:
        monkeypatch.setenv("GODEBUG", before)
    done = to_the_end(crcli, tmp_path / "1", *SHELL, 'echo "$GODEBUG"')
    assert done.out == f"{after}\n"


def test_tunables_stay_in_force_beside_a_baseline(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is started for the CPUs of a fleet keeps what else it was to be started with."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    fleet = tmp_path / "fleet.json"
    host = {"name": "old", "machine": "x86_64", "cpu_model": "old", "cpu_flags": ["sse2"]}
    fleet.write_text(json.dumps({"host": host}))
    done = to_the_end(crcli, tmp_path / "1", "--cpu-baseline", str(fleet), *SHELL, 'echo "$GLIBC_TUNABLES"')
    assert done.out.startswith("glibc.malloc.arena_max=2:glibc.cpu.hwcaps=-")


def test_output_and_errors_in_one_stay_in_order(crcli: Crcli, tmp_path: Path) -> None:
    """Where both of ours are one file, what the job writes to either comes in its order."""
    with job(
        crcli,
        tmp_path / "1",
        *SHELL,
        "for i in 1 2 3; do echo $i; echo $i >&2; done",
        stderr=subprocess.STDOUT,
    ) as one:
        one.end(0)
    assert [line for line in one.out.splitlines() if line.isdigit()] == ["1", "1", "2", "2", "3", "3"]


def test_a_signal_ends_a_job_as_a_shell_says(crcli: Crcli, tmp_path: Path) -> None:
    """128 + N for a job that signal N ended."""
    to_the_end(crcli, tmp_path / "1", *SHELL, "kill -KILL $$", code=128 + 9)


def test_a_command_that_is_not_there_is_127(crcli: Crcli, tmp_path: Path) -> None:
    """As a shell has it, and with the name of what was not found."""
    done = to_the_end(crcli, tmp_path / "1", "--", "/no/such/program", code=127)
    assert "/no/such/program" in done.err


def test_a_job_reads_our_input(crcli: Crcli, tmp_path: Path) -> None:
    """From a pipe, and from a file at the place where we stood."""
    with job(crcli, tmp_path / "1", "--", "cat", stdin=subprocess.PIPE) as one:
        assert one.process.stdin is not None
        one.process.stdin.write(b"from a pipe")
        one.process.stdin.close()
        one.end(0)
    assert one.out == "from a pipe"
    (tmp_path / "input").write_text("first\nsecond\n")
    with (tmp_path / "input").open("rb") as file:
        file.seek(6)
        with job(crcli, tmp_path / "2", "--", "cat", stdin=file) as one:
            one.end(0)
    assert one.out == "second\n"


def test_a_full_disk_below_the_output_does_not_end_a_job(crcli: Crcli, tmp_path: Path) -> None:
    """What it cannot write is lost, as without us; what it writes when there is room again is not."""
    job_itself = "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))\n"
    job_itself += "while True: os.write(1, b'x' * 4096); open(FILE, 'a').write('.')\n"
    full, seen = tmp_path / "full", tmp_path / "seen"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=True)
    try:
        with (full / "out").open("ab") as out:
            code = job_itself.replace("FILE", repr(str(seen)))
            with job(crcli, tmp_path / "1", *python_job(code), stdout=out) as one:
                wait_until(lambda: seen.exists() and seen.stat().st_size > 100, "it does not go on", 30.0)
                (full / "out").write_bytes(b"")
                wait_until(lambda: (full / "out").stat().st_size > 0, "what it writes is lost", 30.0)
                one.tell(signal.SIGUSR1)
                one.end(3)
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_what_a_job_leaves_running_ends_with_it(crcli: Crcli, tmp_path: Path) -> None:
    """A daemon (twice forked, in its own session) stays below the job's init, and goes when the job does."""
    daemon = ["sleep", f"1000.{os.getpid()}"]  # none of another test's
    script = f"(setsid {' '.join(daemon)} &) ; sleep 0.2; ps -o ppid= -C sleep | tr -d ' ' | sort -u; exit 0"
    done = to_the_end(crcli, tmp_path / "1", *SHELL, script)
    assert "2" in done.out.split()  # the init's pid in the job's own namespace
    assert not [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == daemon]


def test_signals_reach_the_job(crcli: Crcli, tmp_path: Path) -> None:
    """What is no notice is passed on: the job handles it."""
    script = "trap 'echo one; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    with job(crcli, tmp_path / "1", *SHELL, script) as one:
        one.wait_for("ready")
        one.tell(signal.SIGUSR1)
        one.end(3)
    assert one.out.splitlines()[-1] == "one"


def test_a_signal_at_the_word_that_it_began_is_the_jobs(crcli: Crcli, tmp_path: Path) -> None:
    """Who reads that a job was started may send it a signal at once: the job has it, and crcli lives on."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    try:
        while os.write(writes, b"x" * 4096):  # crcli stands still at its first word until somebody reads
            continue
    except BlockingIOError:
        os.set_blocking(writes, True)
    script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    output = tmp_path / "output"
    command = (*SHELL, f"exec >{output}; {script}")
    with job(crcli, tmp_path / "1", "--notice", "none", *command, stderr=writes) as one:
        os.close(writes)
        wait_until(lambda: output.exists() and output.read_text() == "ready\n", "it did not start", 30.0)
        wait_until(lambda: is_writing(one.process.pid), "crcli has nothing to say", 30.0)
        one.tell(signal.SIGTERM)
        while os.read(reads, 1 << 16):
            continue
        one.end(3)
    os.close(reads)


def is_writing(pid: int) -> bool:
    """Whether a process's main thread is in the system call write, to its standard error."""
    number, _, arguments = Path(f"/proc/{pid}/syscall").read_text().partition(" ")
    return number in ("1", "64") and arguments.startswith("0x2 ")  # on x86-64, on arm64


def test_signals_that_are_ignored_do_not_reach_the_job(crcli: Crcli, tmp_path: Path) -> None:
    """Under nohup a job outlives the terminal that it was started from."""

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    script = "trap 'echo usr1; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    with job(crcli, tmp_path / "1", *SHELL, script, preexec_fn=nohup) as one:
        one.wait_for("ready")
        one.tell(signal.SIGHUP)
        one.tell(signal.SIGUSR1)
        one.end(3)
    assert one.out.splitlines()[-1] == "usr1"


def as_by_default() -> None:
    """What a terminal's shell does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ignore_and_block() -> None:
    """What nohup and a shell's & do, and what few do."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM})


@pytest.mark.parametrize("namespace", ["auto", "host"])
@pytest.mark.parametrize("caller", [as_by_default, ignore_and_block])
def test_a_job_handles_signals_as_without_us(
    crcli: Crcli, tmp_path: Path, caller: Callable[[], None], namespace: str
) -> None:
    """What whoever started us ignores or blocks, it does. What we ignore ourselves, as every Python does, it
    does not: `yes | head` ends."""
    command = ["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"]
    with job(crcli, tmp_path / "1", "--pid-namespace", namespace, "--", *command, preexec_fn=caller) as one:
        one.end(0)
    without = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=caller)
    assert one.out == without.stdout


def test_without_notices_sigterm_is_the_job_s(crcli: Crcli, tmp_path: Path) -> None:
    """`--notice none` leaves every signal to the job."""
    script = "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    with job(crcli, tmp_path / "1", "--notice", "none", *SHELL, script) as one:
        one.wait_for("ready")
        one.tell(signal.SIGTERM)
        one.end(5)
    assert one.out.splitlines()[-1] == "term"


@pytest.mark.parametrize("namespace", ["auto", "host"])
def test_a_job_dies_with_its_supervisor(crcli: Crcli, tmp_path: Path, namespace: str) -> None:
    """Killed, crcli leaves nothing running: another node may have the job as soon as the lease is out. Nor is
    there anything left of the file of its number."""
    with job(
        crcli,
        tmp_path / "1",
        "--pid-namespace",
        namespace,
        *SHELL,
        "(setsid sleep 999 &); echo $CRCLI_LEASE_FILE; echo ready; sleep 999",
    ) as one:
        one.wait_for("ready")
        number = Path(one.out.splitlines()[0])
        assert number.exists()
        one.tell(signal.SIGKILL)
        one.process.wait()
        wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in one.processes), "left")
        wait_until(lambda: not number.exists(), "the number is left")


def test_a_job_ends_though_a_dump_of_it_left_a_zombie(crcli: Crcli, tmp_path: Path) -> None:
    """CRIU works in the job's pid namespace, which is not over before whoever has it as a child reaped it: we
    do, where the process that had started it is gone."""
    script = f"echo ready; while [ ! -e {tmp_path}/over ]; do sleep 0.05; done; exit 3"
    with job(crcli, tmp_path / "1", "--every", "1s", *SHELL, script) as one:
        one.wait_for("ready")
        orphan_a_criu(one)
        (tmp_path / "over").touch()
        one.end(3)


def orphan_a_criu(one: Job) -> None:
    """Kill the nsenter through which a supervisor's dumper has started CRIU inside the job's namespace."""

    def has_one() -> bool:
        for pid in below(one.process.pid):
            if comm_of(pid) == "nsenter" and (inside := child_pids(pid)):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda pid=pid: not child_pids(pid), "it lives", 30.0)
                return bool(set(inside) & set(child_pids(one.process.pid)))
        return False

    wait_until(has_one, "no image is taken for long enough", 50.0)


def below(pid: int) -> list[int]:
    """All descendants."""
    found = child_pids(pid)
    for one in found:
        found += child_pids(one)
    return found


def comm_of(pid: int) -> str:
    """The name of what a process runs; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_as_the_first_process_of_a_container(crcli: Crcli, tmp_path: Path) -> None:
    """As pid 1 of a pid namespace it reaps, passes signals on, and ends with the job's code."""
    folder = tmp_path / "1"
    folder.mkdir()
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m", "crcli"]
    command += [
        "run",
        "--name",
        "job",
        "--store",
        crcli.store,
        *SHELL,
        "(setsid sh -c 'sleep 0.1' &); exit 9",
    ]
    done = subprocess.run(command, env=crcli.environment, capture_output=True, timeout=60)
    assert done.returncode == 9, done.stderr


# --- saved, and brought back ------------------------------------------------------------------------------


def test_a_job_that_was_moved_writes_what_it_would_have(crcli: Crcli, tmp_path: Path) -> None:
    """Saved at a notice (exit 75), started again, twice: its output is that of one that nobody disturbed."""
    written = ""
    for number in (1, 2):
        with job(crcli, tmp_path / str(number), *steps(150, 0.05)) as one:
            one.lines(8)
            one.tell(signal.SIGTERM)
            one.end(75)
            assert one.report["end"] == "saved" and one.report["saved"].startswith("job@")
            assert "outside the tree" not in one.err  # its output is ours
        written += one.out
    done = to_the_end(crcli, tmp_path / "3", *steps(150, 0.05))
    assert done.report["begun"] == "restored" and done.report["image"] == one.report["saved"]
    assert written + done.out == result_of_steps(150)


def test_a_job_in_the_host_s_namespace_moves_too(crcli: Crcli, tmp_path: Path) -> None:
    """--pid-namespace host: its pids are ours, and it comes back."""
    with job(crcli, tmp_path / "1", "--pid-namespace", "host", *steps(100, 0.05)) as one:
        one.lines(4)
        one.tell()
        one.end(75)
    done = to_the_end(crcli, tmp_path / "2", *steps(100, 0.05))
    assert one.out + done.out == result_of_steps(100)


def test_a_finished_job_is_not_brought_back(crcli: Crcli, tmp_path: Path) -> None:
    """With exit code 0 its images are gone, and the next start is a fresh one."""
    with job(crcli, tmp_path / "1", *steps(150, 0.05)) as one:
        one.lines(3)
        one.tell()
        one.end(75)
    to_the_end(crcli, tmp_path / "2", *steps(150, 0.05))
    assert crcli.run("ls", "--store", crcli.store, "--json").json["images"] == []
    done = to_the_end(crcli, tmp_path / "3", *steps(150, 0.05))
    assert done.report["begun"] == "fresh" and done.out == result_of_steps(150)


def test_a_job_that_failed_goes_on_from_its_image(crcli: Crcli, tmp_path: Path) -> None:
    """A crash leaves its images: the next start goes on from the newest."""
    script = f"echo begin; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo on; exit 1"
    for number, expected in ((1, "begin\n"), (2, "")):
        with job(crcli, tmp_path / str(number), *SHELL, script) as one:
            wait_until(lambda: "started" in one.err or "restored" in one.err, "not begun")
            time.sleep(0.3)
            one.tell()
            one.end(75)
        assert one.out == expected
    (tmp_path / "go").touch()
    for number in (3, 4):
        done = to_the_end(crcli, tmp_path / str(number), *SHELL, script, code=1)
        assert done.report["begun"] == "restored" and done.out == "on\n"


def test_the_rest_of_our_input_is_there_afterwards(crcli: Crcli, tmp_path: Path) -> None:
    """What a moved job has not read of a pipe yet, it reads from the input of its next supervisor."""
    script = "read a; echo got $a; echo ready; while [ ! -e {go} ]; do sleep 0.05; done; read b; echo got $b"
    script = script.format(go=tmp_path / "go")
    with job(crcli, tmp_path / "1", *SHELL, script, stdin=subprocess.PIPE) as one:
        assert one.process.stdin is not None
        one.process.stdin.write(b"first\n")
        one.process.stdin.flush()
        one.wait_for("ready")
        one.tell()
        one.end(75)
    (tmp_path / "go").touch()
    with job(crcli, tmp_path / "2", *SHELL, script, stdin=subprocess.PIPE) as one:
        assert one.process.stdin is not None
        one.process.stdin.write(b"second\n")
        one.process.stdin.flush()
        one.end(0)
    assert one.out == "got second\n"


def test_a_notice_at_any_moment_of_a_start_loses_nothing(crcli: Crcli, tmp_path: Path) -> None:
    """While crcli starts, claims, and brings the job back: saved (75), or not begun (143); it goes on."""
    written = ""
    with job(crcli, tmp_path / "0", *steps(100, 0.05)) as one:
        one.lines(2)
        one.tell()
        one.end(75)
    written += one.out
    for number in range(1, 7):
        with job(crcli, tmp_path / str(number), *steps(100, 0.05)) as one:
            time.sleep(0.2 * number)
            one.tell()
            assert one.end() in (75, 128 + signal.SIGTERM, -signal.SIGTERM), one.err
        written += one.out
    done = to_the_end(crcli, tmp_path / "7", *steps(100, 0.05))
    assert written + done.out == result_of_steps(100)


def test_fresh_starts_from_the_beginning(crcli: Crcli, tmp_path: Path) -> None:
    """--fresh takes no account of images."""
    with job(crcli, tmp_path / "1", *steps(150, 0.05)) as one:
        one.lines(3)
        one.tell()
        one.end(75)
    done = to_the_end(crcli, tmp_path / "2", "--fresh", *steps(150, 0.05))
    assert done.out == result_of_steps(150)


# --- another job, another host ----------------------------------------------------------------------------


def saved(crcli: Crcli, folder: Path, *arguments: str) -> str:
    """Start a job that waits, save it, and return its image."""
    with job(crcli, folder, *arguments) as one:
        one.wait_for("ready")
        one.tell()
        one.end(75)
        return str(one.report["saved"])


WAITS = "echo ready; while :; do sleep 0.05; done"


def test_another_command_is_refused_or_started_afresh(crcli: Crcli, tmp_path: Path) -> None:
    """An image of another command line is not brought back: exit 24, or a fresh start when asked for."""
    saved(crcli, tmp_path / "1", *SHELL, WAITS)
    done = to_the_end(crcli, tmp_path / "2", *SHELL, "echo other", code=24)
    assert "the command was sh -c" in done.err and done.out == ""
    done = to_the_end(crcli, tmp_path / "3", "--on-mismatch", "fresh", *SHELL, "echo other")
    assert done.out == "other\n" and done.report["begun"] == "fresh"


def test_a_changed_program_is_another_job(crcli: Crcli, tmp_path: Path) -> None:
    """A script on the command line, and files and variables that were named, count by what they hold."""
    script, config = tmp_path / "job.sh", tmp_path / "settings"
    script.write_text(WAITS)
    config.write_text("a")
    line = ("--config", str(config), "--variable", "MODE", "--", "sh", str(script))
    saved(crcli, tmp_path / "1", *line)
    script.write_text(WAITS + " # changed")
    assert f"the file {script} changed" in to_the_end(crcli, tmp_path / "2", *line, code=24).err
    script.write_text(WAITS)
    config.write_text("b")
    assert f"the file {config} changed" in to_the_end(crcli, tmp_path / "3", *line, code=24).err
    config.write_text("a")
    with job(crcli, tmp_path / "4", *line) as one:
        wait_until(lambda: "restored" in one.err or one.process.poll() is not None, "nothing")
        assert one.process.poll() is None, one.err


def test_an_image_that_dump_made_is_not_a_job_s(crcli: Crcli, tmp_path: Path) -> None:
    """`crcli dump` under the same name is another thing: refused, with the reason."""
    image = saved(crcli, tmp_path / "1", *SHELL, WAITS)
    restored = crcli.restore(image)
    crcli.dump(restored["host_pid"], "--name", "job")
    done = to_the_end(crcli, tmp_path / "2", *SHELL, WAITS, code=24)
    assert "not taken by `crcli run`" in done.err


def test_an_image_that_does_not_fit_here(crcli: Crcli, tmp_path: Path) -> None:
    """What restores refuse is the exit code; 75 with retry, and a fresh start with cold. The image stands."""
    held = tmp_path / "held"
    held.write_text("x" * 10)
    line = (*SHELL, f"exec 5<{held}; {WAITS}")
    image = saved(crcli, tmp_path / "1", *line)
    held.write_text("y" * 20)
    assert to_the_end(crcli, tmp_path / "2", *line, code=20).out == ""
    done = to_the_end(crcli, tmp_path / "3", "--on-failure", "retry", *line, code=75)
    assert done.out == "" and "start the same command again" in done.err
    with job(crcli, tmp_path / "4", "--on-failure", "cold", *line) as one:
        one.wait_for("ready")
    assert image in crcli.run("ls", "--store", crcli.store).out


def test_a_file_that_a_lost_job_went_on_with(crcli: Crcli, tmp_path: Path) -> None:
    """What the job wrote after its image was taken is in the way of that image (exit 20), until --files says
    what is to become of it: today's is put aside, or is what the job goes on with."""
    path = tmp_path / "progress"
    line = python_job(
        f"""
import time
file = open({str(path)!r}, "w+")
file.write("at the dump"); file.flush()
print("ready", flush=True)
while True:
    file.seek(0)
    print("reads", repr(file.read()), flush=True)
    time.sleep(0.05)
"""
    )
    saved(crcli, tmp_path / "1", *line)
    path.write_text("afterwards.")
    refused = to_the_end(crcli, tmp_path / "2", *line, code=20)
    assert str(path) in refused.err and "--files image" in refused.err
    with job(crcli, tmp_path / "3", "--files", "host", *line) as one:
        one.wait_for("reads 'afterwards.'")
        one.process.kill()
        one.process.wait()
    with job(crcli, tmp_path / "4", "--files", "image", *line) as one:
        one.wait_for("reads 'at the dump'")
    (aside,) = tmp_path.glob("progress.before-*")
    assert aside.read_text() == "afterwards."


def test_a_damaged_image_gives_way_to_the_one_before(crcli: Crcli, tmp_path: Path) -> None:
    """The newest whole image is brought back, and it is said why not the newest."""
    first = saved(crcli, tmp_path / "1", *SHELL, WAITS)
    with job(crcli, tmp_path / "2", *SHELL, WAITS) as one:
        wait_until(lambda: "restored" in one.err, "not restored")
        time.sleep(0.2)
        one.tell()
        one.end(75)
    newest = one.report["saved"].partition("@")[2]
    path = tmp_path / "store" / "images" / "job" / newest
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with job(crcli, tmp_path / "3", *SHELL, WAITS) as one:
        wait_until(lambda: "restored" in one.err or one.process.poll() is not None, "nothing")
        assert f"restored {first}" in one.err and "damaged" in one.err


def test_an_image_of_a_later_crcli_does_not_give_way(crcli: Crcli, tmp_path: Path) -> None:
    """In a fleet that is being updated a node may not be able to read the newest image. To go on from an
    older one would lose what was done since: nothing is started, or another node is to try."""
    saved(crcli, tmp_path / "1", *SHELL, WAITS)
    with job(crcli, tmp_path / "2", *SHELL, WAITS) as one:
        wait_until(lambda: "restored" in one.err, "not restored")
        time.sleep(0.2)
        one.tell()
        one.end(75)
    path = tmp_path / "store" / "images" / "job" / one.report["saved"].partition("@")[2]
    data = bytearray(path.read_bytes())
    data[8:10] = (VERSION + 1).to_bytes(2, "little")
    data[-32:] = blake3(data[:-32]).digest()
    path.write_bytes(data)
    refused = to_the_end(crcli, tmp_path / "3", *SHELL, WAITS, code=22)
    assert refused.out == "" and "newer crcli" in refused.err
    to_the_end(crcli, tmp_path / "4", "--on-failure", "retry", *SHELL, WAITS, code=75)


# --- one live copy ----------------------------------------------------------------------------------------


def test_a_name_runs_once(crcli: Crcli, tmp_path: Path) -> None:
    """A second `crcli run` of the name starts nothing, and says who has it: exit 23."""
    with job(crcli, tmp_path / "1", *SHELL, WAITS) as one:
        one.wait_for("ready")
        other = to_the_end(crcli, tmp_path / "2", *SHELL, WAITS, code=23)
        assert other.out == "" and str(one.process.pid) in other.err
        assert one.process.poll() is None


def test_a_notice_while_waiting_for_the_name(crcli: Crcli, tmp_path: Path) -> None:
    """Whoever is told to leave while another still has the name starts nothing, and ends with 75 or 23."""
    with job(crcli, tmp_path / "1", *SHELL, WAITS) as one:
        one.wait_for("ready")
        with job(crcli, tmp_path / "2", "--claim-wait", "4", *SHELL, WAITS) as other:
            wait_until(lambda: "waiting to see" in other.err, "not waiting")
            other.tell()
            one.tell()
            one.end(75)
            other.end(75)
            assert other.out == "" and "was not started" in other.err


def test_a_job_can_read_the_number_of_its_lease(crcli: Crcli, tmp_path: Path) -> None:
    """$CRCLI_LEASE_FILE holds it, and a larger one after each move."""
    script = (
        "cat $CRCLI_LEASE_FILE; echo ready; while [ ! -e {go} ]; do sleep 0.05; done; cat $CRCLI_LEASE_FILE"
    )
    line = (*SHELL, script.format(go=tmp_path / "go"))
    with job(crcli, tmp_path / "1", *line) as one:
        one.wait_for("ready")
        one.tell()
        one.end(75)
    (tmp_path / "go").touch()
    done = to_the_end(crcli, tmp_path / "2", *line)
    assert int(done.out) > int(one.out.split()[0])


# --- terminals --------------------------------------------------------------------------------------------


class Terminal:
    """A terminal that a job is started in."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.seen = b""

    def until(self, text: bytes) -> None:
        """Read until it shows this."""
        end = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)

    def type(self, keys: str, text: str = "") -> None:
        """Type this, and read until it shows that."""
        self.seen = b""
        os.write(self.master, keys.encode())
        self.until(text.encode())

    def size(self, rows: int, columns: int) -> None:
        """Change its size."""
        termios.tcsetwinsize(self.master, (rows, columns))


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal."""
    one = Terminal()
    yield one
    os.close(one.master)
    os.close(one.slave)


def in_terminal(
    crcli: Crcli, terminal: Terminal, script: str, shell: Sequence[str] = SHELL, **popen: Any
) -> subprocess.Popen[bytes]:
    """Start a job there."""
    command = [sys.executable, "-m", "crcli", "run", "--name", "job", "--store", crcli.store, *shell, script]
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.slave) | popen
    return subprocess.Popen(command, env=crcli.environment, start_new_session=True, **ends)


def test_only_output_goes_where_our_output_goes(crcli: Crcli, tmp_path: Path, terminal: Terminal) -> None:
    """As without us: errors, keys and prompts stay on the terminal, and what `tee` writes there is lines."""
    script = "echo out; echo err >&2; read x; echo got $x; echo prompt >/dev/tty"
    with (tmp_path / "out").open("wb") as out:
        process = in_terminal(crcli, terminal, script, stdout=out)
        terminal.until(b"err")
        assert termios.tcgetattr(terminal.slave)[1] & termios.OPOST
        terminal.type("hello\n", "prompt")
        assert process.wait(60) == 0
    assert b"hello" in terminal.seen
    assert (tmp_path / "out").read_text() == "out\ngot hello\n"


def test_in_the_background_a_job_runs(crcli: Crcli, terminal: Terminal) -> None:
    """A shell's & does not stop it; it has the keys once it is in front."""
    run = f"{sys.executable} -m crcli run --name job --store {crcli.store} -- sh -c"
    script = f"set -m; {run} 'echo ready; read x; echo got $x; exit 4' & read go; fg; echo it was $?"
    process = subprocess.Popen(
        ["bash", "-c", script], env=crcli.environment, preexec_fn=lambda: os.login_tty(terminal.slave)
    )
    try:
        terminal.until(b"ready")
        terminal.type("go\n", "sh -c")
        terminal.type("hello\n", "it was 4")
        assert b"got hello" in terminal.seen
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_terminal_is_passed_on(crcli: Crcli, tmp_path: Path, terminal: Terminal) -> None:
    """The job has a terminal that controls it: keys, Ctrl-C and the window's size arrive, moved too."""
    script = (
        "trap 'echo interrupted' INT; trap 'echo size $(stty size)' WINCH; tty; stty size; echo ready; "
        'while :; do if read -r line; then echo got $line; fi; [ "$line" = end ] && exit 4; done'
    )
    terminal.size(33, 99)
    process = in_terminal(crcli, terminal, script)
    try:
        terminal.until(b"ready")
        assert b"/dev/pts/" in terminal.seen and b"33 99" in terminal.seen
        os.write(terminal.master, b"hello\n")
        terminal.until(b"got hello")
        os.write(terminal.master, b"\x03")
        terminal.until(b"interrupted")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        terminal.seen = b""
        terminal.size(20, 70)
        process = in_terminal(crcli, terminal, script)
        terminal.until(b"restored")
        os.write(terminal.master, b"again\n")
        terminal.until(b"got again")
        os.write(terminal.master, b"end\n")
        assert process.wait(60) == 4
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash"])
def test_a_shell_controls_its_jobs(crcli: Crcli, terminal: Terminal, shell: str) -> None:
    """An interactive shell opens /dev/tty and stops, continues and interrupts jobs, moved again and again."""
    words = ("--", *shell.split())
    terminal.size(24, 80)
    for _ in range(3):
        process = in_terminal(crcli, terminal, "-i", words)
        try:
            terminal.type("echo is$((6 * 7)) >/dev/tty\n", "is42")
            terminal.type("sleep 500\n", "sleep 500\r\n")
            time.sleep(0.3)
            terminal.type("\x1a", "topped")
            terminal.type("fg\n", "sleep 500\r\n")
            time.sleep(0.3)
            terminal.type("\x03")
            terminal.type("echo still $((7 * 8))\n", "still 56")
            terminal.type("stty size\n", "24 80")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
        finally:
            process.kill()
            process.wait()
    process = in_terminal(crcli, terminal, "-i", words)
    terminal.type("exit 5\n")
    assert process.wait(60) == 5

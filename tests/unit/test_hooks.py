"""scripts/hooks/: each file is run, or read, by what would run or read it, as far as that is here.

`crcli` is a stand-in that notes how it was called; every call must be one that the real command line takes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from crcli.app import COMMANDS, build_app
from crcli.notice import Notices
from crcli.notice.kubernetes import DEFAULT_FILE
from tests.support.notices import ENOUGH_S, next_of

HOOKS = Path(__file__).parents[2] / "scripts" / "hooks"
FILES = sorted(
    str(path.relative_to(HOOKS)) for path in HOOKS.rglob("*") if path.is_file() and path.suffix != ".md"
)
SCRIPTS = [name for name in FILES if (HOOKS / name).read_text().startswith("#!")]
UNITS = [name for name in FILES if name.startswith("systemd/")]
NOT_YET = {"run", "watch"} - set(COMMANDS)

STAND_IN = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
sys.exit(int(os.environ.get("STAND_IN_EXIT", "0")))
"""


class StandIn:
    """A `crcli` (and what else is asked for) in a folder of its own, first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "calls"
        self.add("crcli", STAND_IN.format(python=sys.executable, log=str(self._log)))

    def add(self, name: str, text: str) -> Path:
        """Put a program into the folder."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def environ(self, **more: str) -> dict[str, str]:
        """An environment in which the folder comes first."""
        return {"PATH": f"{self.folder}:/usr/bin:/bin", **more}

    def run(self, command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
        """Run something that calls crcli."""
        # The hooks put /usr/local/bin first; a crcli that is installed there is not ours.
        command = [part.replace("/usr/local/bin", str(self.folder)) for part in command]
        return subprocess.run(
            command, env=self.environ(**environ), capture_output=True, text=True, timeout=ENOUGH_S
        )

    @property
    def calls(self) -> list[list[str]]:
        """How crcli was called."""
        return [call for call, _ in self.calls_with_environment]

    @property
    def calls_with_environment(self) -> list[tuple[list[str], dict[str, str]]]:
        """The same, each with the variables that it saw."""
        if not self._log.exists():
            return []
        return [tuple(json.loads(line)) for line in self._log.read_text().splitlines()]

    def copy(self, name: str) -> str:
        """A hook, with our folder in the place of /usr/local/bin."""
        text = (HOOKS / name).read_text().replace("/usr/local/bin", str(self.folder))
        return str(self.add(Path(name).name, text))


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    """A `crcli` that notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return StandIn(folder)


def assert_crcli_takes(call: list[str]) -> None:
    """Fail unless the real command line parses this call; nothing of it is done."""
    name, *arguments = call
    if name in NOT_YET:
        return
    assert name in COMMANDS, name
    build_app().get_command(None, name).make_context(name, arguments)


def lines_of(name: str) -> str:
    """A hook without its comments."""
    text = (HOOKS / name).read_text()
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def unit_of(name: str) -> dict[str, dict[str, list[str]]]:
    """The sections of a unit: for each setting its values."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in lines_of(name).splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line:
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


# --- what they are -----------------------------------------------------------------------------------------


def test_every_hook_is_in_the_list_and_says_how_it_is_installed() -> None:
    """A file that the list does not name would not be found; one that does not say how would not be used."""
    listed = (HOOKS / "README.md").read_text()
    for name in FILES:
        assert Path(name).name in listed or Path(name).suffix in (".timer",), name
        assert re.search(
            r"^# *(Install|.*Submit)", (HOOKS / name).read_text(), re.MULTILINE
        ) or name.endswith(".timer"), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_valid_and_can_be_run(name: str) -> None:
    """The shell that its first line names finds no error in its syntax."""
    path = HOOKS / name
    shell = path.read_text().splitlines()[0].removeprefix("#!").split()
    assert subprocess.run([*shell, "-n", str(path)], capture_output=True, text=True).stderr == ""
    assert os.access(path, os.X_OK)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    """Quoting and the like, where the tool is here."""
    done = subprocess.run(["shellcheck", str(HOOKS / name)], capture_output=True, text=True)
    assert done.stdout == ""


# --- cron --------------------------------------------------------------------------------------------------


def test_cron_runs_a_dump_that_leaves_the_tree_running(stand_in: StandIn, tmp_path: Path) -> None:
    """The line has its five times, a user and a command without a `%`, which works as it stands."""
    *settings, line = lines_of("cron/crcli-snapshots").split("\n")
    fields = re.fullmatch(r"([\d*,/-]+(?: [\d*,/-]+){4}) (\w+) (.+)", line)
    assert fields is not None and fields[2] == "root" and "%" not in fields[3]
    variables = dict(setting.split("=", 1) for setting in settings)
    assert "." not in "crcli-snapshots" and variables["SHELL"] == "/bin/bash"
    (tmp_path / "agent.pid").write_text("4711\n")
    command = re.sub(r"/run/|/var/log/", f"{tmp_path}/", fields[3])
    done = stand_in.run(["/bin/bash", "-c", command])
    assert done.returncode == 0, done.stderr
    (call,) = stand_in.calls
    assert call[:2] == ["dump", "4711"] and "--leave-running" in call
    assert_crcli_takes(call)


# --- systemd -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_units(stand_in: StandIn, tmp_path: Path) -> None:
    """`systemd-analyze verify` knows every setting and finds every program."""
    units = tmp_path / "units"
    units.mkdir()
    agent = "[Unit]\nDescription=an agent\n[Service]\nExecStart=/bin/true\n"
    (units / "agent.service").write_text(agent)
    stand_in.add("dump-trees", "#!/bin/sh\n")
    names = []
    for name in UNITS:
        text = (HOOKS / name).read_text().replace("MY-AGENT", "agent")
        text = re.sub("/usr/local/(?:bin|lib/crcli)", str(stand_in.folder), text)
        names.append(Path(name).name.replace("@", "@agent"))
        (units / names[-1]).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(units / name) for name in names)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},
        capture_output=True,
        text=True,
    )
    ours = [line for line in done.stderr.splitlines() if any(name in line for name in names)]
    assert ours == [] and "not executable" not in done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in UNITS if "crcli-job" in name or "crcli-watch" in name])
def test_systemd_stops_a_job_as_crcli_must_be_stopped(name: str) -> None:
    """SIGTERM goes to crcli alone; the grace time that it is told is shorter than systemd's patience."""
    service = unit_of(name)["Service"]
    assert service["KillMode"] == ["mixed"]
    (grace,) = service["Environment"]
    assert 0 < int(grace.removeprefix("CRCLI_GRACE=")) < int(service["TimeoutStopSec"][0])
    assert service["SuccessExitStatus"] == ["75"]


@pytest.mark.parametrize("name", [name for name in UNITS if name.endswith(".service")])
def test_systemd_calls_crcli_as_it_can_be_called(name: str, stand_in: StandIn) -> None:
    """Every command of a unit, with the names and variables that systemd puts in."""
    systemctl = '#!/bin/sh\n[ "$*" = "show --property=MainPID --value agent.service" ] && echo 4711\n'
    stand_in.add("systemctl", systemctl)
    stand_in.copy("dump-trees")
    for setting, (line,) in unit_of(name)["Service"].items():
        if setting not in ("ExecStart", "ExecStop"):
            continue
        line = re.sub("/usr/local/(?:bin|lib/crcli)", str(stand_in.folder), line.replace("%i", "agent"))
        words = [word.replace("$$", "$") for word in shlex.split(line)]
        command = [one for word in words for one in (["/bin/x", "y"] if word == "$COMMAND" else [word])]
        done = stand_in.run(command, CRCLI_TREES="/nonexistent")
        assert done.returncode == 0, done.stderr
    for call in stand_in.calls:
        assert call[0] == "run" or call[1] == "4711"
        assert_crcli_takes(call)
    assert bool(stand_in.calls) != ("before-shutdown" in name)


# --- Kubernetes --------------------------------------------------------------------------------------------


def pod() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The job, its pod, and the container in it."""
    job = yaml.safe_load((HOOKS / "kubernetes/job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return job, spec, container


def test_the_pod_s_entrypoint_is_a_call_of_crcli() -> None:
    """`command` and `args` together."""
    _, _, container = pod()
    program, *call = container["command"] + container["args"]
    assert program == "crcli" and call[0] == "run" and call[call.index("--") + 1 :] == container["args"]
    assert_crcli_takes(call)


def test_the_pod_s_times_fit() -> None:
    """The hook and crcli are told less than what there is."""
    _, spec, container = pod()
    environ = {one["name"]: one["value"] for one in container["env"]}
    assert 0 < float(environ["CRCLI_GRACE"]) < spec["terminationGracePeriodSeconds"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["/usr/local/lib/crcli/pre-stop"]


def test_the_job_knows_crcli_s_exit_codes() -> None:
    """75 is no failure; what trying again cannot help ends the job. The API takes such a policy as it is."""
    job, spec, container = pod()
    assert (job["apiVersion"], job["kind"], spec["restartPolicy"]) == ("batch/v1", "Job", "Never")
    actions = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        assert set(rule) == {"action", "onExitCodes"} or set(rule) == {"action", "onPodConditions"}
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"] and codes["operator"] == "In"
            actions |= dict.fromkeys(codes["values"], rule["action"])
    assert actions == {75: "Ignore", 2: "FailJob", 22: "FailJob", 24: "FailJob"}


def test_the_pod_has_what_the_doctor_asks_for() -> None:
    """Every capability that crcli cannot do without, beside those that a container has anyway."""
    from crcli.guard.doctor.rights import _NEEDED

    usual = {"CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"}
    _, _, container = pod()
    added = {f"CAP_{name}" for name in container["securityContext"]["capabilities"]["add"]}
    assert set(_NEEDED) <= added | usual


def test_the_pre_stop_hook_waits_until_the_job_is_saved(tmp_path: Path) -> None:
    """It gives notice with the time that is left, waits, and ends well when the image is durable."""
    file = tmp_path / "run" / "leave"
    environ = {"PATH": "/usr/bin:/bin", "CRCLI_NOTICE_FILE": str(file), "CRCLI_GRACE": "600"}
    with Notices(["kubernetes"], environ=environ) as notices:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "leave.saved").touch()  # of an earlier time
        hook = subprocess.Popen([HOOKS / "kubernetes" / "pre-stop", "300"], env=environ)
        notice = next_of(notices)
        assert notice.reason == "the pod is stopped (preStop)" and file.read_text() == "300\n"
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(0.5)
        notice.on_saved()
        assert hook.wait(ENOUGH_S) == 0


def test_the_pre_stop_hook_does_not_wait_for_ever(tmp_path: Path) -> None:
    """Where nobody saves anything it fails when its time is up: Kubernetes says so, and sends SIGTERM."""
    environ = {"PATH": "/usr/bin:/bin", "CRCLI_NOTICE_FILE": str(tmp_path / "leave")}
    done = subprocess.run([HOOKS / "kubernetes" / "pre-stop", "0"], env=environ, timeout=ENOUGH_S)
    assert done.returncode == 1


def test_the_pre_stop_hook_and_crcli_mean_the_same_file() -> None:
    """By default, too."""
    assert f"{{CRCLI_NOTICE_FILE:-{DEFAULT_FILE}}}" in (HOOKS / "kubernetes/pre-stop").read_text()


# --- Slurm -------------------------------------------------------------------------------------------------


def test_the_batch_script_becomes_crcli(stand_in: StandIn) -> None:
    """`B:` signals the script's own process, so that must be crcli; the name is the same after a requeue."""
    done = stand_in.run([str(HOOKS / "slurm/job.sbatch")], SLURM_JOB_ID="17", SLURM_JOB_NAME="agent")
    assert done.returncode == 0, done.stderr
    ((call, environ),) = stand_in.calls_with_environment
    assert call[call.index("--name") + 1] == "agent-17" and environ["CRCLI_STORE"].startswith("s3://")
    assert_crcli_takes(call)
    assert lines_of("slurm/job.sbatch").strip().splitlines()[-1].startswith("exec crcli run")
    options = re.findall(r"^#SBATCH (\S+)$", (HOOKS / "slurm/job.sbatch").read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)
    head = (HOOKS / "slurm/job.sbatch").read_text().partition("\nexport")[0]
    assert head.count("#SBATCH") == len(options)  # sbatch reads none after the first command


@pytest.mark.parametrize(
    ("constraints", "doctor", "code"),
    [("crcli", 0, 0), ("crcli", 1, 0), ("crcli", 40, 1), ("gpu&crcli", 40, 1), ("", 40, 0), ("gpu", 40, 0)],
)
def test_the_prolog_drains_only_nodes_that_lack_something(
    stand_in: StandIn, constraints: str, doctor: int, code: int
) -> None:
    """Another failure of ours must not take nodes out of a cluster; other jobs are none of our business."""
    prolog = stand_in.copy("slurm/prolog")
    done = stand_in.run([prolog], SLURM_JOB_CONSTRAINTS=constraints, STAND_IN_EXIT=str(doctor))
    assert done.returncode == code
    for call in stand_in.calls:
        assert_crcli_takes(call)


# --- clouds ------------------------------------------------------------------------------------------------


@pytest.fixture
def trees(tmp_path: Path) -> Callable[..., str]:
    """Write a list of trees, with their pid files; returns its path."""

    def write(**pids: int | None) -> str:
        lines = ["# name pidfile", ""]
        for name, pid in pids.items():
            lines.append(f"{name} {tmp_path / name}.pid")
            if pid is not None:
                (tmp_path / f"{name}.pid").write_text(f"{pid}\n")
        (tmp_path / "trees").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "trees")

    return write


def test_a_shutdown_dumps_every_tree_of_the_list(stand_in: StandIn, trees: Callable[..., str]) -> None:
    """All at once, each with the time that is left; one that does not run is left out."""
    script = stand_in.copy("dump-trees")
    listed = trees(agent=4711, stopped=None, other=4712)
    Path(listed).write_text(Path(listed).read_text().rstrip("\n"))
    done = stand_in.run([script, "20"], CRCLI_TREES=listed)
    assert done.returncode == 0, done.stderr
    assert sorted(call[1] for call in stand_in.calls) == ["4711", "4712"]
    for call in stand_in.calls:
        assert call[call.index("--deadline") + 1] == "20"
        assert_crcli_takes(call)


def test_a_shutdown_without_a_list_does_nothing(stand_in: StandIn) -> None:
    """No file, no trees, no error."""
    done = stand_in.run([stand_in.copy("dump-trees")], CRCLI_TREES="/nonexistent")
    assert (done.returncode, stand_in.calls) == (0, [])


def test_a_shutdown_that_could_not_dump_says_so(stand_in: StandIn, trees: Callable[..., str]) -> None:
    """The exit code is crcli's."""
    listed = trees(agent=4711)
    done = stand_in.run([stand_in.copy("dump-trees")], CRCLI_TREES=listed, STAND_IN_EXIT="11")
    assert done.returncode == 11


def test_google_s_shutdown_script_calls_it(stand_in: StandIn, trees: Callable[..., str]) -> None:
    """With less than the 30 seconds that there are."""
    script, listed = stand_in.copy("dump-trees"), trees(agent=4711)
    hook = str(HOOKS / "cloud/gcp-shutdown-script")
    assert stand_in.run([hook], CRCLI_DUMP_TREES=script, CRCLI_TREES=listed).returncode == 0
    ((call, environ),) = stand_in.calls_with_environment
    assert float(call[call.index("--deadline") + 1]) < 30 and environ["CRCLI_STORE"].startswith("s3://")


def test_user_data_starts_the_unit_that_is_there(stand_in: StandIn, tmp_path: Path) -> None:
    """AWS's and Azure's: what they write is what the unit reads, and what they start is that unit."""
    stand_in.add("systemctl", f'#!/bin/sh\necho "$@" >>{tmp_path}/systemctl\n')
    text = (HOOKS / "cloud/aws-user-data").read_text().replace("/etc/crcli", str(tmp_path / "etc"))
    done = stand_in.run([str(stand_in.add("user-data", text))])
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "etc" / "agent.env").read_text()
    config = yaml.safe_load((HOOKS / "cloud/azure-custom-data").read_text())
    assert (HOOKS / "cloud/azure-custom-data").read_text().startswith("#cloud-config\n")
    (file,) = config["write_files"]
    assert file["content"] == written and set(re.findall(r"^(\w+)=", written, re.MULTILINE)) == {
        *("CRCLI_STORE", "COMMAND"),
    }
    started = (tmp_path / "systemctl").read_text().split()
    assert config["runcmd"] == [["systemctl", *started]] and started[-1] == "crcli-job@agent.service"
    service = unit_of("systemd/crcli-job@.service")["Service"]
    assert service["EnvironmentFile"] == [file["path"].replace("agent", "%i")]

"""ls, show, verify, rm, cp, gc and doctor as commands: what they print, and how they end."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from crcli.criu import netlock
from crcli.errors import HostLacks
from crcli.guard.doctor import criu as doctor_criu
from crcli.guard.doctor import gpus, host, kernel, rights
from crcli.image import owner
from crcli.image.lease import Lease, LeaseState
from crcli.image.manifest import list_images
from crcli.image.names import PACKS, manifest_key
from crcli.main import main
from crcli.store.file import FileStore
from tests.support.images import make_image, pages


class Cli:
    """The command in this process, on one store."""

    def __init__(self, store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
        self.store = store
        self._capsys = capsys

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run it with --json; return the one object, after asserting that nothing else was said."""
        assert main([*arguments, "--store", self.store.url, "--json"]) == code
        said = self._capsys.readouterr()
        assert said.err == ""
        found: dict[str, Any] = json.loads(said.out)
        return found

    def text(self, *arguments: str, code: int = 0) -> str:
        """Run it for people; return what it printed on stdout."""
        assert main([*arguments, "--store", self.store.url]) == code
        return self._capsys.readouterr().out


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command, with an empty store."""
    for name in ("CRCLI_STORE", "CRCLI_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    store = FileStore(str(tmp_path / "store"))
    store.warm(for_writing=True)
    return Cli(store, capsys)


def test_ls(cli: Cli) -> None:
    """ls lists every image, or those of one name; an empty store is no error."""
    assert cli.json("ls") == {"store": cli.store.url, "images": []}
    assert "no images" in cli.text("ls")
    one = make_image(cli.store, "one", pages(1, 2))
    make_image(cli.store, "two", pages(2, 2))
    assert [image["image"] for image in cli.json("ls", "one")["images"]] == [str(one)]
    assert cli.text("ls", "none") == f"no images of the name none in {cli.store.url}\n"
    assert list(cli.json("ls")["images"][0]) == [
        "image",
        "name",
        "id",
        "created",
        "processes",
        "memory_bytes",
        "new_bytes",
        "host",
        "command",
        "damage",
        "claim",
    ]
    lines = cli.text("ls").splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(str(one)) and lines[1].endswith("agent --serve")


def test_ls_of_a_store_that_is_not_there(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that was named must be there; the default one comes with the first dump."""
    missing = f"file://{tmp_path}/missing"
    assert main(["ls", "--store", missing]) == 31
    monkeypatch.setenv("CRCLI_STORE", missing)
    assert main(["ls"]) == 0


def test_show(cli: Cli) -> None:
    """show says what an image holds, the newest of a name unless an id is given, also by full URL."""
    first = make_image(cli.store, "agent", pages(1, 2))
    second = make_image(cli.store, "agent", pages(1, 3))
    assert cli.json("show", "agent")["id"] == second.id
    facts = cli.json("show", f"{cli.store.url}/{first}")
    assert facts["id"] == first.id
    assert facts["memory_bytes"] == 2 * 4096
    assert facts["files"] == [
        {"path": "/var/log/agent.log", "bytes": 6, "role": "written", "mode": 0o600, "uid": 0}
    ]
    assert facts["host"]["hostname"] == "node-1"
    said = cli.text("show", "agent")
    assert "agent --serve" in said and "/var/log/agent.log" in said


def test_verify(cli: Cli) -> None:
    """verify says that an image is whole; one that is not ends with 22 and a list of what is damaged."""
    ref = make_image(cli.store, "agent", pages(1, 2))
    assert cli.json("verify", "agent")["damage"] == []
    assert "is whole" in cli.text("verify", "agent")
    (key,) = (info.key for info in cli.store.list(PACKS))
    Path(cli.store.root, key).unlink()
    error = cli.json("verify", str(ref), code=22)["error"]
    assert error["code"] == "image-damaged"
    assert [finding["name"] for finding in error["findings"]] == ["pack-missing"]


@pytest.mark.parametrize("command", ["show", "verify", "check", "restore"])
def test_an_image_of_a_later_crcli_is_said_to_be_one(cli: Cli, command: str) -> None:
    """It ends with 22 as a damaged one does, with a word of its own: what is whole is not to be removed."""
    ref = make_image(cli.store, "agent", pages(1, 2))
    path = Path(cli.store.root, manifest_key(ref.name, ref.id))
    data = bytearray(path.read_bytes())
    data[8:10] = (3).to_bytes(2, "little")
    path.write_bytes(data)
    error = cli.json(command, str(ref), code=22)["error"]
    assert (error["code"], error["state"]) == ("image-too-new", "untouched")
    assert error["hint"] == "use a newer crcli"


def test_rm(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """rm removes the newest of a name, and lets go of the connections that its dump still holds."""
    released: list[str] = []
    monkeypatch.setattr(netlock, "remove_for", released.append)
    first = make_image(cli.store, "agent", pages(1, 2))
    second = make_image(cli.store, "agent", pages(1, 2))
    assert cli.json("rm", "agent") == {"image": str(second), "store": cli.store.url, "removed": True}
    assert [ref for ref, _ in list_images(cli.store)] == [first]
    assert len(released) == 1
    assert cli.json("rm", str(second), code=31)["error"]["code"] == "not-found"


def test_cp(cli: Cli, tmp_path: Path) -> None:
    """cp puts an image into another store, and says so when it is there already."""
    ref = make_image(cli.store, "agent", pages(1, 2))
    other = f"file://{tmp_path}/other"
    report = cli.json("cp", "agent", other)
    assert (report["packs_copied"], report["was_there"]) == (1, False)
    assert cli.json("cp", "agent", other)["was_there"]
    assert main(["verify", f"{other}/{ref}"]) == 0


def test_gc(cli: Cli) -> None:
    """gc says what it freed; --dry-run what it would."""
    make_image(cli.store, "agent", pages(1, 2))
    cli.json("rm", "agent")
    assert cli.json("gc")["packs_removed"] == 0
    assert cli.json("gc", "--dry-run", "--grace", "0")["packs_removed"] == 1
    assert "1 pack " in cli.text("gc", "--grace", "0")
    assert list(cli.store.list(PACKS)) == []


def test_leases(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """lease ls, ls and show say who holds a name; lease break takes it away, unless its holder lives here."""
    make_image(cli.store, "agent", pages(1, 2))
    assert cli.json("lease", "ls") == {"store": cli.store.url, "leases": []}
    assert "no name is claimed" in cli.text("lease", "ls")
    assert cli.json("ls")["images"][0]["claim"] is None and cli.json("show", "agent")["claim"] is None
    lease = Lease.claim(cli.store, "agent", "a test")
    (claim,) = cli.json("lease", "ls")["leases"]
    assert (claim["name"], claim["number"], claim["seen"]) == ("agent", 1, "alive")
    assert cli.json("ls")["images"][0]["claim"] == cli.json("show", "agent")["claim"] == claim
    for command in (("lease", "ls"), ("ls",), ("show", "agent")):
        assert "a test on" in cli.text(*command)
    assert cli.json("lease", "break", "agent", code=23)["error"]["code"] == "name-claimed"
    monkeypatch.setattr(owner, "_here", lambda: {"boot": "another"})
    assert cli.json("lease", "break", "agent")["broken"] == claim | {"seen": "unseen", "renewed": 0.0}
    assert cli.json("lease", "ls")["leases"] == []
    assert cli.json("lease", "break", "agent", code=31)["error"]["code"] == "not-found"
    lease._renew()
    assert lease.state == LeaseState.LOST


# --- doctor ------------------------------------------------------------------------------------------------


def test_doctor_agrees_with_itself(cli: Cli) -> None:
    """doctor's exit code says whether anything is lacking, and whatever is lacking has a remedy."""
    assert main(["doctor", "--store", cli.store.url, "--json"]) in (0, 40)
    found = json.loads(cli._capsys.readouterr().out)
    lacking = [check for check in found["checks"] if check["status"] == "lacks"]
    assert found["ok"] == (not lacking)
    assert all(check["remedy"] for check in lacking)
    assert {"kernel", "capabilities", "criu", "pycriu", "namespaces", "network-locks", "store"} <= {
        check["name"] for check in found["checks"]
    }
    fields = ["name", "status", "message", "evidence", "remedy", "family"]
    assert all(list(check) == fields for check in found["checks"])
    assert len({check["name"] for check in found["checks"]}) == len(found["checks"])


@pytest.mark.parametrize(
    ("prepare", "name"),
    [
        (lambda patch: patch.setattr(rights, "effective", lambda: 0), "capabilities"),
        (lambda patch: patch.setattr(kernel, "_can_trace", lambda: False), "tracing"),
        (lambda patch: patch.setenv("CRCLI_CRIU", "/nonexistent/criu"), "criu"),
        (lambda patch: patch.setenv("CRCLI_CRIU", "/bin/true"), "criu"),
        (lambda patch: patch.setattr(kernel, "works_in_child", lambda attempt: False), "namespaces"),
    ],
    ids=["no capabilities", "no tracing", "no criu", "a criu that is none", "no namespaces"],
)
def test_doctor_names_what_is_lacking(
    prepare: Any, name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the main job cannot do without is found, with its remedy, and ends with 40."""
    prepare(monkeypatch)
    found = {check["name"]: check for check in cli.json("doctor", code=40)["checks"]}
    assert found[name]["status"] == "lacks"
    assert found[name]["remedy"]
    assert "cannot be dumped here yet" in cli.text("doctor", code=40)


def test_doctor_knows_an_old_criu(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CRIU older than 4.1 is not good enough."""
    old = tmp_path / "criu"
    old.write_text("#!/bin/sh\necho Version: 3.17.1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CRCLI_CRIU", str(old))
    found = {check["name"]: check for check in cli.json("doctor", code=40)["checks"]}
    assert (found["criu"]["status"], found["criu"]["evidence"]["version"]) == ("lacks", "3.17.1")


@pytest.mark.parametrize(("all_sockets_say", "status"), [(True, "ok"), (False, "lacks")])
def test_doctor_knows_a_criu_too_old_for_the_kernel(
    all_sockets_say: bool, status: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CRIU 4.1 asks every socket for what Linux 6.16 says of some only, though its own check passes."""
    old = tmp_path / "criu"
    old.write_text("#!/bin/sh\necho Version: 4.1.1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CRCLI_CRIU", str(old))
    monkeypatch.setattr(doctor_criu, "_all_sockets_say_passcred", lambda: all_sockets_say)
    found = {check["name"]: check for check in cli_json(cli, "doctor")["checks"]}
    assert found["criu"]["status"] == status


def test_doctor_looks_for_all_packages() -> None:
    """What pyproject.toml asks for is what doctor looks for."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert set(doctor_criu._PACKAGES) == asked


def test_doctor_looks_at_the_store(cli: Cli, tmp_path: Path) -> None:
    """A store that cannot be written is found before a dump has to find it; nothing is created meanwhile."""
    (tmp_path / "file").write_text("in the way")
    cli.store = FileStore(str(tmp_path / "file"))
    found = {check["name"]: check for check in cli.json("doctor", code=40)["checks"]}
    assert found["store"]["status"] == "lacks"
    assert main(["doctor", "--store", f"{tmp_path}/not/yet"]) in (0, 40)
    assert not (tmp_path / "not").exists()


def test_doctor_lets_go_of_connections(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that dumps left are named, and removed upon --fix only."""
    tables = {"CRIU-abc"}
    monkeypatch.setattr(netlock, "tables", lambda: set(tables))
    monkeypatch.setattr(netlock, "remove", tables.remove)
    checks = {check["name"]: check for check in cli_json(cli, "doctor")["checks"]}
    assert checks["network-locks"]["evidence"] == {"tables": ["CRIU-abc"]}
    assert cli_json(cli, "doctor", "--fix")["released"] == ["CRIU-abc"]
    assert tables == set()


def test_doctor_describes_the_host(cli: Cli) -> None:
    """What a fleet compares has stable names; the CPU's flags are a list."""
    found = cli_json(cli, "doctor")["host"]
    assert list(found) == [
        "hostname",
        "kernel",
        "machine",
        "page_size",
        "cpus",
        "cpu_vendor",
        "cpu_model",
        "cpu_flags",
        "memory_bytes",
        "swap_bytes",
        "container",
        "crcli",
        "criu",
        "python",
        "gpus",
        "gpu_driver",
    ]
    words = Path("/proc/cpuinfo").read_text().split()
    assert found["cpu_flags"] == sorted(found["cpu_flags"]) and set(found["cpu_flags"]) <= set(words)
    assert found["cpu_flags"] and found["memory_bytes"] > 0


def test_doctor_for_people(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks stand below the name of their family; remedies come after them, the gravest first."""
    monkeypatch.setenv("CRCLI_CRIU", "/nonexistent/criu")
    lines = cli.text("doctor", code=40).splitlines()
    families = [line.split()[0] for line in lines[2 : lines.index("")] if not line.startswith(" ")]
    assert families == ["kernel", "rights", "criu", "machine", "gpus", "leftovers", "places"]
    remedies = lines[lines.index("") + 1 :]
    lacking = [check["name"] for check in cli.json("doctor", code=40)["checks"] if check["status"] == "lacks"]
    assert [line.partition(":")[0] for line in remedies[: len(lacking)]] == lacking


def test_the_flags_are_those_of_every_processor() -> None:
    """Where processors differ, a program can count on what all of them have only."""
    text = "processor\t: 0\nflags\t\t: fpu sse avx\n\nprocessor\t: 1\nflags\t\t: sse fpu\n"
    found = host.cpu(text)
    assert (found["cpus"], found["cpu_flags"], found["cpu_model"]) == (2, ["fpu", "sse"], "")


def _no_cuda(hand: object) -> None:
    raise HostLacks("cuda-python cannot be imported", hint="pip install 'crcli[gpu]'")


def test_doctor_names_gpus(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose driver cannot be used is named, with what is lacking; everything else can be dumped."""
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
    monkeypatch.setattr(gpus, "read", lambda path: text)
    assert gpus.gpu_driver() == "580.95.05"
    monkeypatch.setattr(gpus, "gpus", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(gpus.Hand, "host", _no_cuda)
    (check,) = gpus._gpus()
    assert (check.name, check.status) == ("gpu", "note")
    assert "GPU memory cannot be saved" in check.message and check.remedy
    assert check.evidence == {"devices": ["/dev/nvidia0"], "driver": "580.95.05"}


def cli_json(cli: Cli, *arguments: str) -> dict[str, Any]:
    """Run it, whether or not this host is fit."""
    assert main([*arguments, "--store", cli.store.url, "--json"]) in (0, 40)
    found: dict[str, Any] = json.loads(cli._capsys.readouterr().out)
    return found

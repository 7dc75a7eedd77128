"""What a fleet's CPUs have in common, and which variables follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crcli.errors import UsageError
from crcli.guard.baseline import (
    LEVELS,
    Baseline,
    common_to,
    environment_for,
    level_of,
    read_baseline,
    read_hosts,
)

V2 = {"fpu", "sse2", "nx", "syscall", "aes", "pclmulqdq", *LEVELS["x86-64-v2"].split()}
V3 = V2 | set(LEVELS["x86-64-v3"].split()) | {"xsavec", "rdrand", "rdseed", "adx"}
V4 = V3 | set(LEVELS["x86-64-v4"].split()) | {"avx512_vnni"}


def report(folder: Path, name: str, flags: set[str], machine: str = "x86_64") -> str:
    """What `crcli doctor --json` prints on a host, as far as a baseline reads it."""
    path = folder / f"{name}.json"
    host = {"hostname": name, "machine": machine, "cpu_model": f"model of {name}", "cpu_flags": sorted(flags)}
    path.write_text(json.dumps({"ok": True, "host": host}))
    return str(path)


def baseline(flags: set[str]) -> Baseline:
    """A baseline of these flags."""
    return Baseline("x86_64", frozenset(flags))


def test_a_baseline_is_what_all_hosts_have(tmp_path: Path) -> None:
    """Flags that one host lacks are out; each host's surplus is named, without what only the kernel uses."""
    paths = [report(tmp_path, "new", V4 | {"smep"}), report(tmp_path, "old", V3)]
    hosts = read_hosts(paths)
    common = common_to(hosts)
    assert common.flags == V3 and level_of(common) == "x86-64-v3"
    assert hosts[0].beyond(common) == sorted(V4 - V3) and hosts[1].beyond(common) == []


@pytest.mark.parametrize(
    ("flags", "level"),
    [(V4, "x86-64-v4"), (V4 - {"avx512cd"}, "x86-64-v3"), (V2, "x86-64-v2"), (V4 - {"cx16"}, "x86-64-v1")],
)
def test_levels_build_on_each_other(flags: set[str], level: str) -> None:
    """A CPU that lacks something of a level has none of those above."""
    assert level_of(baseline(flags)) == level


def test_what_is_printed_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON of a baseline is a baseline, and so is one host's report."""
    from crcli.ui.baseline import show_baseline

    paths = [report(tmp_path, "new", V4), report(tmp_path, "old", V2)]
    hosts = read_hosts(paths)
    show_baseline(common_to(hosts), hosts, as_json=True)
    printed = capsys.readouterr().out
    (tmp_path / "fleet.json").write_text(printed)
    assert read_baseline(str(tmp_path / "fleet.json")) == baseline(V2) == read_baseline(paths[1])
    assert json.loads(printed)["environment"] == environment_for(baseline(V2))


@pytest.mark.parametrize(
    "data", ["", "[]", "{}", '{"host": {}}', '{"host": {"cpu_flags": 7, "machine": "x86_64"}}', "nonsense"]
)
def test_what_is_no_report_is_refused(data: str, tmp_path: Path) -> None:
    """A file that says nothing of a CPU is wrong usage, and so is one that is not there."""
    path = tmp_path / "report.json"
    path.write_text(data)
    for wrong in (path, tmp_path / "nowhere"):
        with pytest.raises(UsageError):
            read_baseline(str(wrong))


def test_architectures_have_no_baseline_in_common(tmp_path: Path) -> None:
    """Hosts of two architectures are refused; one that is not x86-64 needs no variables that we know."""
    paths = [report(tmp_path, "one", V2), report(tmp_path, "arm", {"asimd"}, "aarch64")]
    with pytest.raises(UsageError, match="aarch64, x86_64"):
        common_to(read_hosts(paths))
    assert environment_for(read_baseline(paths[1])) == {}


def words(environment: dict[str, str], name: str) -> set[str]:
    """The words of a variable."""
    return set(environment[name].replace("=", " ").replace(",", " ").split())


def test_a_baseline_without_avx512() -> None:
    """Each library is told the most that the baseline allows, and glibc each feature that it does not."""
    found = environment_for(baseline(V3))
    assert words(found, "GLIBC_TUNABLES") >= {"-AVX512F", "-AVX512VL", "-RTM"}
    assert not words(found, "GLIBC_TUNABLES") & {"-AVX2", "-XSAVEC", "-BMI2"}
    assert words(found, "NPY_DISABLE_CPU_FEATURES") >= {"X86_V4", "AVX512F", "AVX512_SKX", "AVX512_ICL"}
    assert not words(found, "NPY_DISABLE_CPU_FEATURES") & {"X86_V3", "AVX2", "FMA3", "F16C"}
    assert found["OPENBLAS_CORETYPE"] == "Haswell" and found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert found["ATEN_CPU_CAPABILITY"] == "avx2"
    one, two = (int(word.removeprefix("~"), 16) for word in found["OPENSSL_ia32cap"].split(":"))
    assert one == 0 and two & 1 << 16 and not two & 1 << 5


def test_a_baseline_with_avx512_but_not_the_newest() -> None:
    """What the baseline has stays in use."""
    found = environment_for(baseline(V4))
    assert found["OPENBLAS_CORETYPE"] == "SkylakeX" and found["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_VNNI"
    assert words(found, "NPY_DISABLE_CPU_FEATURES") >= {"AVX512_ICL", "AVX512_SPR"}
    assert not words(found, "NPY_DISABLE_CPU_FEATURES") & {"X86_V4", "AVX512F", "AVX512_CLX"}
    assert "ATEN_CPU_CAPABILITY" not in found


def test_an_old_baseline() -> None:
    """Without AVX everybody is left with SSE."""
    found = environment_for(baseline(V2))
    assert found["OPENBLAS_CORETYPE"] == "Nehalem" and found["ATEN_CPU_CAPABILITY"] == "default"
    assert words(found, "NPY_DISABLE_CPU_FEATURES") >= {"X86_V3", "AVX2", "AVX", "F16C"}
    assert words(found, "GLIBC_TUNABLES") >= {"-AVX2", "-AVX", "-BMI2", "-XSAVEC"}


@pytest.mark.parametrize(
    ("theirs", "kept"),
    [
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.cpu.hwcaps=-AVX512ER"),
        (
            "glibc.cpu.hwcaps=-ERMS:glibc.malloc.perturb=3",
            "glibc.malloc.perturb=3:glibc.cpu.hwcaps=-ERMS,-AVX512ER",
        ),
    ],
)
def test_tunables_of_the_users_own_stay(theirs: str, kept: str) -> None:
    """Ours are added to what the user has set."""
    found: dict[str, Any] = environment_for(baseline(V4), {"GLIBC_TUNABLES": theirs})
    assert found["GLIBC_TUNABLES"].startswith(kept)

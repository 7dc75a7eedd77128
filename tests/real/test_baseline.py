"""Programs that are started for a CPU baseline: which code runs in them is looked at, library by library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crcli.guard import cpu
from crcli.guard.baseline import LEVELS, Baseline, environment_for
from tests.support.crcli import Crcli

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the variables are x86-64's")

HERE = frozenset(cpu.flags_here())
WITHOUT_AVX512 = frozenset(flag for flag in HERE if not flag.startswith(("avx512", "amx")))
WITHOUT_AVX = WITHOUT_AVX512 - {*LEVELS["x86-64-v3"].split(), "vaes", "vpclmulqdq", "xsavec"}
BASELINES = {"without AVX-512": WITHOUT_AVX512, "without AVX": WITHOUT_AVX}

LOADER = next(iter(Path("/lib64").glob("ld-linux-x86-64.so.2")), None)


@pytest.fixture(params=BASELINES, ids=lambda name: name)
def flags(request: pytest.FixtureRequest) -> frozenset[str]:
    """The flags of a baseline that this host exceeds."""
    found: frozenset[str] = BASELINES[request.param]
    if found == HERE:
        pytest.skip(f"this CPU is itself one {request.param}")
    return found


def run(command: list[str], flags: frozenset[str] | None) -> str:
    """What a command prints that is started for a baseline, or for none."""
    more = environment_for(Baseline("x86_64", flags)) if flags is not None else {}
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | more
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(code: str, flags: frozenset[str] | None) -> str:
    """What Python code prints in an interpreter that is started for a baseline, or for none."""
    return run([sys.executable, "-c", code], flags)


@pytest.mark.skipif(LOADER is None, reason="no glibc here")
def test_glibc_uses_no_more(flags: frozenset[str]) -> None:
    """Of the features that the dynamic linker reports as active none is beyond the baseline."""
    usual, told = (Active(run([str(LOADER), "--list-diagnostics"], which)) for which in (None, flags))
    assert usual - told
    for name, (word, register, bit) in GLIBC_BITS.items():
        if name not in flags:
            assert not told.get(word, register) >> bit & 1, f"{name} is active"


class Active:
    """The features that a report of the dynamic linker's calls active: bits by CPUID word and register."""

    def __init__(self, report: str) -> None:
        found = re.findall(
            r"^x86\.cpu_features\.features\[(0x\w+)\]\.active\[(0x\w+)\]=(0x\w+)$", report, re.MULTILINE
        )
        self.words = {(int(word, 16), int(register, 16)): int(bits, 16) for word, register, bits in found}

    def get(self, word: int, register: int) -> int:
        """The bits of one register; 0 eax, 1 ebx, 2 ecx, 3 edx."""
        return self.words.get((word, register), 0)

    def __sub__(self, other: Active) -> set[tuple[int, int]]:
        return {key for key, bits in self.words.items() if bits & ~other.words.get(key, 0)}


GLIBC_BITS = {
    "avx": (0, 2, 28), "fma": (0, 2, 12), "movbe": (0, 2, 22),
    "avx2": (1, 1, 5), "bmi1": (1, 1, 3), "bmi2": (1, 1, 8), "avx512f": (1, 1, 16), "avx512dq": (1, 1, 17),
    "avx512cd": (1, 1, 28), "avx512bw": (1, 1, 30), "avx512vl": (1, 1, 31), "abm": (2, 2, 5),
    "xsavec": (3, 0, 1),
}  # fmt: skip
"""Where glibc's report has features by which it chooses: its word (CPUID leaf), the register, and the bit."""


def test_numpy_dispatches_no_further(flags: frozenset[str]) -> None:
    """Of the groups of features that NumPy dispatches to, those beyond the baseline are off."""
    code = """
        from numpy._core._multiarray_umath import __cpu_dispatch__ as groups, __cpu_features__ as on
        print(*(group for group in groups if on.get(group)))
        """
    code = "\n".join(line.strip() for line in code.splitlines())
    usual, told = (set(python(code, which).split()) for which in (None, flags))
    assert usual - told
    assert not {group for group in told if "AVX512" in group or group == "X86_V4"}
    if "avx2" not in flags:
        assert not told & {"X86_V3", "AVX2", "FMA3", "AVX"}


def test_openblas_takes_older_kernels(flags: frozenset[str]) -> None:
    """The OpenBLAS that comes with NumPy runs the kernels of a processor within the baseline."""
    code = """
        import ctypes, glob, numpy
        (library,) = glob.glob(numpy.__path__[0] + "/../numpy.libs/libscipy_openblas64*")
        name = ctypes.CDLL(library).scipy_openblas_get_corename64_
        name.restype = ctypes.c_char_p
        print(name().decode())
        """
    code = "\n".join(line.strip() for line in code.splitlines())
    usual, told = (python(code, which).strip() for which in (None, flags))
    assert told == ("Haswell" if "avx2" in flags else "Nehalem") != usual


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_uses_no_more(flags: frozenset[str]) -> None:
    """The CPU as OpenSSL sees it has none of what the baseline lacks."""
    usual, told = (openssl_words(run(["openssl", "version", "-c"], which)) for which in (None, flags))
    assert usual != told
    assert not told[1] >> 16 & 1, "AVX-512"
    assert not told[1] >> 41 & 1 or "vaes" in flags, "VAES"
    if "avx2" not in flags:
        assert not told[1] >> 5 & 1 and not told[0] >> 60 & 1, "AVX"


def openssl_words(report: str) -> tuple[int, ...]:
    """The words that `openssl version -c` prints."""
    found = re.search(r"OPENSSL_ia32cap=(0x\w+):(0x\w+)", report)
    assert found, report
    return tuple(int(word, 16) for word in found.groups())


def test_pytorch_and_onednn_use_no_more(flags: frozenset[str]) -> None:
    """PyTorch's own kernels and those that oneDNN compiles are of the baseline's instructions."""
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode:
        pytest.skip("no PyTorch here")
    code = """
        import torch
        print(torch.backends.cpu.get_cpu_capability())
        with torch.backends.mkldnn.verbose(1):
            torch.nn.Conv2d(3, 8, 3)(torch.randn(2, 3, 32, 32))
        """
    code = code.replace("\n        ", "\n")
    usual, told = (python(code, which) for which in (None, flags))
    wanted = (
        ("AVX2", "isa:Intel AVX2", "jit:avx2")
        if "avx2" in flags
        else ("DEFAULT", "isa:Intel SSE4.1", "jit:sse41")
    )
    for words in wanted:
        assert words in told and not (words in usual and "avx2" in flags), told
    assert "avx512" not in told and "AVX-512" not in told


def test_the_report_of_this_host_is_its_baseline(crcli: Crcli, tmp_path: Path) -> None:
    """What the doctor says of one host is a baseline of one: nothing is beyond it."""
    report = tmp_path / "host.json"
    report.write_text(crcli.run("doctor", "--json").out)
    found = crcli.run("doctor", "--cpu-baseline", str(report), str(report), "--json").json
    assert set(found["cpu_flags"]) == HERE and [host["beyond"] for host in found["hosts"]] == [[], []]
    assert "x86-64-v" in crcli.run("doctor", "--cpu-baseline", str(report)).out
    crcli.run("doctor", str(report), code=2)
    crcli.run("doctor", "--cpu-baseline", code=2)

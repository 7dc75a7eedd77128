"""What the CPUs of a fleet have in common, and how a program is started so that it uses no more than that.

Programs and libraries choose their code by what the CPU can do, once, when they start; an image of them fits
CPUs that can do the same. Some let themselves be told by environment variables to be content with less. Those
that stand here were tried by looking at which code then ran (tests/real/test_baseline.py); NOT_REACHED names
what none of them reaches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crcli.errors import UsageError
from crcli.guard import cpu
from crcli.records import Struct

LEVELS = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
}
"""The levels of the x86-64 ABI, the newest first, by the flags that each adds to the one before."""

NOT_REACHED = (
    "Java, Node.js and other runtimes that compile while they run, Go, and Rust programs that ask the CPU",
    "Intel MKL, in which PyTorch multiplies matrices (on AMD it heeds no variable; on Intel none was tried)",
    "libraries with dispatch of their own: zstd, BLAKE3, ONNX Runtime, XNNPACK, FBGEMM, GnuTLS, FFmpeg",
    "whatever was compiled for the machine that it was built on (-march=native)",
    "OpenSSL 3.5's instructions for SHA-512, SM3 and SM4",
)
"""Code that no variable reaches: an image of it fits the baseline only if it happens to use no more."""


class Baseline(Struct, frozen=True):
    """What several hosts have in common: the architecture, and /proc/cpuinfo's flags."""

    machine: str
    flags: frozenset[str]

    def kept_here(self) -> list[str]:
        """What an image taken here, of a program started for this baseline, may use (sorted)."""
        return sorted(self.flags & cpu.flags_here())


class Host(Struct, frozen=True):
    """One host of a fleet, by the `host` of its `crcli doctor --json`."""

    name: str
    machine: str
    cpu_model: str
    flags: frozenset[str]

    @classmethod
    def parse(cls, data: Any) -> Host:
        """Read a report of the doctor's, parsed. Raises ValueError when it is none."""
        facts = data["host"] if isinstance(data, dict) and "host" in data else data
        try:
            flags = frozenset(map(str, facts["cpu_flags"]))
            return cls(
                str(facts.get("hostname", "")), str(facts["machine"]), str(facts.get("cpu_model", "")), flags
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("it is no report of `crcli doctor --json`") from error

    def beyond(self, baseline: Baseline) -> list[str]:
        """What programs may use on this host, and not on all (sorted)."""
        return sorted(cpu.used_by_programs(set(self.flags - baseline.flags), self.machine))


def read_hosts(paths: Sequence[str]) -> list[Host]:
    """Read reports of `crcli doctor --json`. Raises UsageError for a file that is none."""
    return [_read(path) for path in paths]


def read_baseline(path: str) -> Baseline:
    """Read what `crcli doctor --cpu-baseline … --json` printed, or one host's report. Raises UsageError."""
    host = _read(path)
    return Baseline(host.machine, host.flags)


def _read(path: str) -> Host:
    try:
        with open(path, encoding="utf-8") as file:
            return Host.parse(json.load(file))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(
            f"{path} is no report of `crcli doctor --json`", hint="crcli doctor --json >FILE, on each host"
        ) from error


def common_to(hosts: Sequence[Host]) -> Baseline:
    """What these hosts have in common. Raises UsageError when they are of different architectures."""
    machines = {host.machine for host in hosts}
    if len(machines) != 1:
        names = ", ".join(sorted(machines))
        raise UsageError(f"no program runs on {names} alike", hint="make a baseline for each architecture")
    return Baseline(machines.pop(), frozenset.intersection(*(host.flags for host in hosts)))


def level_of(baseline: Baseline) -> str:
    """The highest level of the x86-64 ABI that all have; empty for other architectures."""
    if baseline.machine != "x86_64":
        return ""
    found = "x86-64-v1"
    for name, words in reversed(LEVELS.items()):
        if not baseline.flags.issuperset(words.split()):
            break
        found = name
    return found


def environment_for(baseline: Baseline, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables with which a program uses no more than the baseline, as far as they reach.

    `environ` is what it would be started with otherwise: what stands in its GLIBC_TUNABLES stays in force.
    Other architectures than x86-64 get none.
    """
    if baseline.machine != "x86_64":
        return {}
    found = {name: value(baseline.flags) for name, value in _VARIABLES.items()}
    found["GLIBC_TUNABLES"] = _joined((environ or {}).get("GLIBC_TUNABLES", ""), found["GLIBC_TUNABLES"])
    return {name: value for name, value in found.items() if value}


_GLIBC = {
    "AVX512F": "avx512f", "AVX512VL": "avx512vl", "AVX512BW": "avx512bw", "AVX512DQ": "avx512dq",
    "AVX512CD": "avx512cd", "AVX512ER": "avx512er", "AVX512PF": "avx512pf", "AVX2": "avx2", "AVX": "avx",
    "FMA": "fma", "FMA4": "fma4", "BMI1": "bmi1", "BMI2": "bmi2", "LZCNT": "abm", "MOVBE": "movbe",
    "POPCNT": "popcnt", "SSE4_2": "sse4_2", "SSE4_1": "sse4_1", "SSSE3": "ssse3", "XSAVEC": "xsavec",
    "RTM": "rtm",
}  # fmt: skip
"""The names that glibc's tunable glibc.cpu.hwcaps knows, and the kernel's (abm is LZCNT)."""

_HWCAPS = "glibc.cpu.hwcaps="


def _glibc(flags: frozenset[str]) -> str:
    """String functions, lazy binding, and the folders of libraries that the dynamic linker chooses from."""
    off = [f"-{name}" for name, flag in _GLIBC.items() if flag not in flags]
    return _HWCAPS + ",".join(off) if off else ""


def _joined(theirs: str, ours: str) -> str:
    """Both tunables in one: of two settings of one name glibc would take one only."""
    kept = [word for word in theirs.split(":") if word and not word.startswith(_HWCAPS)]
    wanted = [word.removeprefix(_HWCAPS) for word in (*theirs.split(":"), ours) if word.startswith(_HWCAPS)]
    return ":".join([*kept, *([_HWCAPS + ",".join(wanted)] if wanted else [])])


_AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl"


def _steps(*steps: tuple[str, str]) -> Callable[[frozenset[str]], str]:
    """A variable that takes one of these values, each with the flags that it needs, the most demanding first.

    A baseline that has all of them needs no variable: the value of the first is empty.
    """

    def value(flags: frozenset[str]) -> str:
        return next((name for name, needs in steps if flags.issuperset(needs.split())), steps[-1][0])

    return value


_NUMPY = (
    (_AVX512, "AVX512F AVX512CD AVX512_SKX X86_V4"),
    (f"{_AVX512} avx512_vnni", "AVX512_CLX"),
    (f"{_AVX512} avx512ifma avx512vbmi", "AVX512_CNL"),
    (
        f"{_AVX512} avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq "
        "vaes gfni vpclmulqdq",
        "AVX512_ICL",
    ),
    (f"{_AVX512} avx512_fp16", "AVX512_SPR"),
    ("avx512er avx512pf", "AVX512_KNL AVX512_KNM"),
    ("avx2 fma f16c bmi1 bmi2 abm movbe", "X86_V3 AVX2 FMA3"),
    ("avx f16c", "F16C"),
    ("avx", "AVX"),
)
"""The flags that groups of NumPy's features need; names that a version does not know it passes over."""


def _numpy(flags: frozenset[str]) -> str:
    return " ".join(names for needs, names in _NUMPY if not flags.issuperset(needs.split()))


_OPENSSL = (
    {32 + 1: "pclmulqdq", 32 + 9: "ssse3", 32 + 12: "fma", 32 + 22: "movbe", 32 + 25: "aes", 32 + 28: "avx",
     32 + 30: "rdrand"},
    {3: "bmi1", 5: "avx2", 8: "bmi2", 16: "avx512f", 17: "avx512dq", 18: "rdseed", 19: "adx",
     21: "avx512ifma", 28: "avx512cd", 29: "sha_ni", 30: "avx512bw", 31: "avx512vl", 32 + 1: "avx512vbmi",
     32 + 6: "avx512_vbmi2", 32 + 8: "gfni", 32 + 9: "vaes", 32 + 10: "vpclmulqdq"},
)  # fmt: skip
"""The bits of OPENSSL_ia32cap's two words: CPUID 1 (edx, ecx) and CPUID 7 (ebx, ecx)."""


def _openssl(flags: frozenset[str]) -> str:
    masks = [sum(1 << bit for bit, flag in word.items() if flag not in flags) for word in _OPENSSL]
    return ":".join(f"~{mask:#x}" for mask in masks) if any(masks) else ""


_AMX = "amx_tile amx_int8 amx_bf16"

_VARIABLES: dict[str, Callable[[frozenset[str]], str]] = {
    "GLIBC_TUNABLES": _glibc,
    "OPENBLAS_CORETYPE": _steps(
        ("", f"{_AVX512} avx512_bf16 {_AMX}"),
        ("Cooperlake", f"{_AVX512} avx512_bf16"),
        ("SkylakeX", _AVX512),
        ("Haswell", "avx2 fma"),
        ("Sandybridge", "avx"),
        ("Nehalem", "ssse3 sse4_1 sse4_2"),
        ("Prescott", ""),
    ),
    "NPY_DISABLE_CPU_FEATURES": _numpy,
    "ONEDNN_MAX_CPU_ISA": _steps(
        ("", f"{_AVX512} avx512_vnni avx512_bf16 avx512_fp16 {_AMX}"),
        ("AVX512_CORE_BF16", f"{_AVX512} avx512_vnni avx512_bf16"),
        ("AVX512_CORE_VNNI", f"{_AVX512} avx512_vnni"),
        ("AVX512_CORE", _AVX512),
        ("AVX2", "avx2 fma"),
        ("AVX", "avx"),
        ("SSE41", ""),
    ),
    "ATEN_CPU_CAPABILITY": _steps(("", _AVX512), ("avx2", "avx2 fma"), ("default", "")),
    "OPENSSL_ia32cap": _openssl,
}

"""What a CPU can do that programs use: /proc/cpuinfo's words for it, and CRIU's.

A program looks at the CPU when it starts and chooses its code by what it finds; on a CPU that lacks some of
it, it dies of SIGILL at whatever moment. What only the kernel uses does not matter.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re

_USED_BY_PROGRAMS = re.compile(
    r"""fpu|cx8|cx16|cmov|mmx|mmxext|fxsr|sse|sse2|pni|ssse3|sse4_1|sse4_2|sse4a|misalignsse|3dnow|3dnowext
    |avx\w*|fma|fma4|f16c|xop|tbm|lwp|aes|vaes|pclmulqdq|vpclmulqdq|gfni|sha_ni|sha512|sm3|sm4
    |abm|bmi1|bmi2|adx|popcnt|movbe|lahf_lm|rdrand|rdseed|rdpid|rdtscp|rdpru|fsgsbase
    |xsave|xsaveopt|xsavec|xgetbv1|amx_\w+|apx\w*|pku|ospke|rtm|user_shstk
    |clflush|clflushopt|clwb|clzero|cldemote|movdiri|movdir64b|enqcmd|waitpkg|serialize|tsxldtrk
    |cmpccxadd|rao_int|prefetchi|ptwrite|usr_msr""",
    re.VERBOSE,
)

_BITS: dict[int, dict[int, str]] = {
    0: {
        0: "fpu", 4: "tsc", 8: "cx8", 11: "sep", 15: "cmov", 19: "clflush", 23: "mmx", 24: "fxsr", 25: "sse",
        26: "sse2",
    },
    1: {11: "syscall", 22: "mmxext", 27: "rdtscp", 30: "3dnowext", 31: "3dnow"},
    4: {
        0: "pni", 1: "pclmulqdq", 3: "monitor", 9: "ssse3", 12: "fma", 13: "cx16", 19: "sse4_1", 20: "sse4_2",
        22: "movbe", 23: "popcnt", 25: "aes", 26: "xsave", 27: "osxsave", 28: "avx", 29: "f16c", 30: "rdrand",
    },
    6: {
        5: "abm", 6: "sse4a", 7: "misalignsse", 8: "3dnowprefetch", 11: "xop", 16: "fma4", 21: "tbm",
    },
    9: {
        0: "fsgsbase", 3: "bmi1", 4: "hle", 5: "avx2", 8: "bmi2", 9: "erms", 11: "rtm", 14: "mpx",
        16: "avx512f", 17: "avx512dq", 18: "rdseed", 19: "adx", 23: "clflushopt", 26: "avx512pf",
        27: "avx512er", 28: "avx512cd", 29: "sha_ni", 30: "avx512bw", 31: "avx512vl",
    },
    10: {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves"},
    11: {
        1: "avx512vbmi", 3: "pku", 5: "waitpkg", 6: "avx512_vbmi2", 8: "gfni", 9: "vaes", 10: "vpclmulqdq",
        11: "avx512_vnni", 12: "avx512_bitalg", 14: "avx512_vpopcntdq", 22: "rdpid", 25: "cldemote",
        27: "movdiri", 28: "movdir64b", 29: "enqcmd",
    },
    18: {
        2: "avx512_4vnniw", 3: "avx512_4fmaps", 8: "avx512_vp2intersect", 14: "serialize", 16: "tsxldtrk",
        22: "amx_bf16", 23: "avx512_fp16", 24: "amx_tile", 25: "amx_int8",
    },
}  # fmt: skip
"""For the words of CRIU's cpuinfo image that come straight from the CPUID instruction: the bits that CRIU
compares before a restore and others that programs use, with /proc/cpuinfo's names for them."""

_LEAVES = {
    0: (1, 0, 3),
    1: (0x8000_0001, 0, 3),
    4: (1, 0, 2),
    6: (0x8000_0001, 0, 2),
    9: (7, 0, 1),
    10: (13, 1, 0),
    11: (7, 0, 2),
    18: (7, 0, 3),
}
"""Where CPUID has each of these words: leaf, sub-leaf, and register (0 to 3: eax, ebx, ecx, edx)."""

_CPUID_CODE = bytes.fromhex("f30f1efa5389f889f14989d00fa241890041895804418948084189500c5bc3")
"""void cpuid(edi leaf, esi subleaf, rdx registers[4]): endbr64, save ebx, execute, store all four, return."""


def used_by_programs(flags: set[str], machine: str) -> set[str]:
    """Those of /proc/cpuinfo's flags that a program may have chosen its code by."""
    if machine not in ("x86_64", "i686"):
        return flags  # aarch64 lists what the kernel tells programs, and nothing else
    return {flag for flag in flags if _USED_BY_PROGRAMS.fullmatch(flag)}


def missing_words(then: tuple[int, ...], now: dict[int, int]) -> set[str]:
    """The features that are missing here: `then` are the words of CRIU's image, `now` ours by number."""
    return {
        name
        for number, bits in _BITS.items()
        if number < len(then) and number in now
        for bit, name in bits.items()
        if then[number] & ~now[number] & 1 << bit
    }


def words_here() -> dict[int, int]:
    """This CPU's words, as CRIU will read them; empty where they cannot be read, which is no reason to fail.

    /proc/cpuinfo would not do: the kernel leaves out what it does not know or use, and CRIU looks itself.
    """
    if os.uname().machine != "x86_64":
        return {}
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return {}  # a policy against memory that is both written and executed
    code.write(_CPUID_CODE)
    entry = ctypes.c_char.from_buffer(code)
    cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(ctypes.addressof(entry))
    registers = (ctypes.c_uint32 * 4)()
    found = {}
    for number, (leaf, subleaf, register) in _LEAVES.items():
        cpuid(leaf & 0x8000_0000, 0, ctypes.addressof(registers))
        if registers[0] >= leaf:
            cpuid(leaf, subleaf, ctypes.addressof(registers))
            found[number] = registers[register]
        else:
            found[number] = 0
    del entry
    return found


def read_cpuinfo(name: bytes) -> str:
    """One field of /proc/cpuinfo, of the first processor; empty where there is none."""
    with open("/proc/cpuinfo", "rb") as file:
        for line in file:
            key, _, value = line.partition(b":")
            if key.strip() == name:
                return value.strip().decode(errors="replace")
    return ""


def flags_here() -> set[str]:
    """The features of this CPU in the kernel's words."""
    return set((read_cpuinfo(b"flags") or read_cpuinfo(b"Features")).split())

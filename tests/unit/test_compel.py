"""Where CRIU writes into processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from crcli.criu.compel import writes_over_memory

_PROGRAM = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
FIXED, low = 0x10, int(sys.argv[1])
if low:
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED
    assert libc.mmap(ctypes.c_void_p(low), ctypes.c_size_t(4096), 7, how, -1, 0) == low
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("low", [0, 1 << 20])
def test_code_that_a_program_has_made_lies_where_criu_writes_if_it_comes_first(low: int) -> None:
    """Otherwise the program's own file does."""
    command = [sys.executable, "-c", _PROGRAM, str(low)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert writes_over_memory(process.pid) == bool(low)
        process.stdin.close()

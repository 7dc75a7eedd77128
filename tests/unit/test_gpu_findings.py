"""What is said of a tree's GPU side from /proc alone: no CUDA, no GPU."""

from __future__ import annotations

from pathlib import Path

from crcli.gpu.preflight import candidates
from crcli.process.evidence import Evidence
from crcli.process.gather import gather
from crcli.process.tree import refuse_bad_target, scan_tree
from tests.support.programs import spawn_python, then_wait


def look(pid: int) -> Evidence:
    """Return the evidence about the tree of a pid, as a dump gathers it."""
    return gather(scan_tree(refuse_bad_target(pid)))


def maps_driver_library(folder: Path) -> str:
    """Return code that maps a file called as CUDA's driver library is."""
    library = folder / "libcuda.so.580.95.05"
    library.write_bytes(bytes(4096))
    return f"""
import mmap
with open({str(library)!r}, "rb") as file:
    library = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
"""


def test_who_has_the_driver_library_may_use_cuda(tmp_path: Path) -> None:
    """Of a tree of two, the process that has libcuda mapped is a candidate, and its parent is not."""
    code = f"import os, time\nif os.fork():\n    time.sleep(600)\n{maps_driver_library(tmp_path)}"
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        assert len(evidence.tree) == 2
        assert candidates(evidence) == [one.pid for one in evidence.tree if one.pid != program.pid]


def test_a_plain_program_is_no_candidate() -> None:
    """Without the library and without a device of NVIDIA's nobody is asked about CUDA."""
    with spawn_python(then_wait()) as program:
        assert candidates(look(program.pid)) == []

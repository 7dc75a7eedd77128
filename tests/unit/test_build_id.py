"""The build-ids by which programs and libraries are known."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from crcli.guard.contents import read_build_id

BUILD_ID = bytes(range(20))


def note(name: bytes, kind: int, body: bytes) -> bytes:
    """One note as it stands in an ELF file."""
    padded = [part + bytes(-len(part) % 4) for part in (name, body)]
    return struct.pack("<III", len(name), len(body), kind) + b"".join(padded)


@pytest.mark.parametrize("whole", [True, False], ids=["in its segment", "behind it"])
def test_a_go_program_has_its_build_id(whole: bool, tmp_path: Path) -> None:
    """Go's linker has the segment of notes end before the GNU build-id, where CRIU finds it."""
    first, second = note(b"Go\0\0", 4, b"x" * 83), note(b"GNU\0", 3, BUILD_ID)
    size = len(first) + (len(second) if whole else 0)
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 120, 120, size, size, 4)
    path = tmp_path / "program"
    path.write_bytes(head + program + first + second + bytes(100))
    with path.open("rb") as file:
        assert read_build_id(file.fileno()) == BUILD_ID.hex()

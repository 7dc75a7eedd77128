"""What CRIU is told to have it leave pages in a tree, and which of them it would call lazy."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from crcli.criu import left_pages, messages
from crcli.criu.images import single_magic
from crcli.memory.extents import PAGE

KERNDAT = struct.Struct("<IIQi4xQ????")


class Images(dict[str, bytes]):
    """Images in memory."""

    def names(self) -> list[str]:
        """See ImageFolder."""
        return sorted(self)

    def read(self, name: str) -> bytes:
        """See ImageFolder."""
        return self[name]


def last_capability() -> int:
    """Of this kernel."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def answers(frame: int = 4711, last: int | None = None, flags: tuple[int, ...] = (0, 1, 1, 1)) -> bytes:
    """What CRIU keeps of a kernel, or something like it."""
    last = last_capability() if last is None else last
    return KERNDAT.pack(1, 2, 3, last, frame, False, True, True, True)[:-4] + bytes(flags) + b"the rest"


def test_only_the_one_byte_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU takes all else for what it has found out itself."""
    monkeypatch.setattr(left_pages, "zero_frame", lambda: 4711)
    before, after = answers(), left_pages.as_tracking(answers())
    assert [at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other] == [32]
    assert (before[32], after[32]) == (0, 1)


@pytest.mark.parametrize(
    "other",
    [
        b"",
        answers()[:35],
        answers(frame=4712),
        answers(last=3),
        answers(flags=(1, 1, 1, 1)),
        answers(flags=(0, 2, 1, 1)),
    ],
)
def test_what_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch, other: bytes) -> None:
    """Another layout, or a kernel that tracks writes."""
    monkeypatch.setattr(left_pages, "zero_frame", lambda: 4711)
    assert left_pages.as_tracking(other) == b""


def partial_image(kind: str, entry: Any) -> bytes:
    """An image file whose message lacks what nobody asks here."""
    body = entry.SerializePartialToString()
    return single_magic(kind) + len(body).to_bytes(4, "little") + body


def test_lazy_is_what_criu_calls_so() -> None:
    """Private anonymous memory but for what is locked or of huge pages, and the kernel's own."""
    private, anonymous, shared, locked, huge = 0x02, 0x20, 0x01, 0x2000, 0x40000
    areas = [  # first page, pages, flags, status
        (10, 10, private | anonymous, 1),
        (30, 5, private, 1 | 1 << 6),
        (40, 5, shared | anonymous, 1 | 1 << 8),
        (50, 5, private | anonymous | locked, 1),
        (60, 5, private | anonymous | huge, 1),
        (70, 2, private | anonymous, 1 | 1 << 3),
        (80, 4, private | anonymous, 1 | 1 << 9),
    ]
    images = Images()
    mm = messages.mm_entry()
    for first, pages, flags, status in areas:
        mm.vmas.add(
            start=first * PAGE,
            end=(first + pages) * PAGE,
            pgoff=0,
            shmid=0,
            prot=3,
            flags=flags,
            status=status,
            fd=-1,
        )
    images["mm-7.img"] = partial_image("MM", mm)
    assert [*left_pages.lazy_areas(images, 7)] == [(10, 10), (80, 4)]

"""Small pieces of text: sizes, times, and text from outside made safe to show."""

from __future__ import annotations

import json
import re
from typing import Any

# Compiled when they are first used: few commands show text from outside, or names that are no UTF-8.
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
_SURROGATE = r"[\ud800-\udfff]"


def printable(text: str) -> str:
    """Return `text` with control characters written out, so that no foreign text can steer a terminal."""
    return re.sub(_CONTROL, lambda found: found[0].encode("unicode_escape").decode(), text)


def json_text(data: Any) -> str:
    """Return `data` as JSON that every reader takes.

    Names of files and commands are any bytes; those that are no UTF-8 are lone surrogates in Python, which
    stricter readers refuse.
    """
    text = json.dumps(data, ensure_ascii=False)
    if not text.isascii():
        text = json.dumps(json.loads(re.sub(_SURROGATE, "\ufffd", text)))
    return text


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(milliseconds: float) -> str:
    """Return a time as people read it."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    if milliseconds < 120_000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds / 60_000:.1f} min"


def count(number: int, noun: str) -> str:
    """Return "1 pack", "2 packs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"

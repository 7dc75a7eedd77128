"""Views of a file of weights: how its bytes may stand in memory. As they are, or cast from one type to
another.

A view turns whole elements of the file into whole elements in memory, one by one, so that any run of them can
be made again from the run of the file that it came from.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.store.base import Buffer


class View(IntEnum):
    """How bytes of a file stand in memory. The numbers are part of the image format."""

    BYTES = 0
    F32_TO_BF16 = 1
    F32_TO_F16 = 2
    BF16_TO_F32 = 3
    F16_TO_F32 = 4
    F64_TO_F32 = 5


class _Cast(NamedTuple):
    """Element sizes in bytes, in the file and in memory, and the function (numpy array to numpy array)."""

    source: int
    target: int
    function: Callable[[Any], Any]


def _f32_to_bf16(raw: Any) -> Any:
    """Round to the nearest, ties to even, as PyTorch and JAX do (NaNs apart, which are then not found)."""
    import numpy as np

    bits = raw.view("<u4")
    return ((bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)).astype(
        "<u2"
    )


def _bf16_to_f32(raw: Any) -> Any:
    import numpy as np

    return raw.view("<u2").astype("<u4") << np.uint32(16)


def _between(source: str, target: str) -> Callable[[Any], Any]:
    def cast(raw: Any) -> Any:
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            return raw.view(source).astype(target)

    return cast


_CASTS = {
    View.F32_TO_BF16: _Cast(4, 2, _f32_to_bf16),
    View.F32_TO_F16: _Cast(4, 2, _between("<f4", "<f2")),
    View.BF16_TO_F32: _Cast(2, 4, _bf16_to_f32),
    View.F16_TO_F32: _Cast(2, 4, _between("<f2", "<f4")),
    View.F64_TO_F32: _Cast(8, 4, _between("<f8", "<f4")),
}

CASTS_OF = {
    "F32": (View.F32_TO_BF16, View.F32_TO_F16),
    "BF16": (View.BF16_TO_F32,),
    "F16": (View.F16_TO_F32,),
    "F64": (View.F64_TO_F32,),
}
"""By the type of a tensor in a file, into what it may have been cast when it was loaded."""


def element_bytes(view: View) -> int:
    """The size of an element in memory: a run begins and ends with whole ones."""
    return _CASTS[view].target if view in _CASTS else 1


def source_element(view: View) -> int:
    """The size of an element in the file."""
    return _CASTS[view].source if view in _CASTS else 1


def source_bytes(view: View, length: int) -> int:
    """How many bytes of the file make `length` bytes of memory (whole elements)."""
    if view not in _CASTS:
        return length
    cast = _CASTS[view]
    return length // cast.target * cast.source


def apply(view: View, raw: Buffer) -> Any:
    """Return what these bytes of a file are in memory, as a numpy array of bytes."""
    import numpy as np

    array = np.frombuffer(raw, dtype=np.uint8)
    return array if view == View.BYTES else _CASTS[view].function(array).view(np.uint8)

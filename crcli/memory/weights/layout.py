"""Where tensors lie in the usual formats: what lets a cast be recognised, and a file be sampled once, not
eight times.

A file that is of no format known here, or is damaged, is a run of bytes in which a tensor may begin anywhere.
Nothing that stands in a header is believed: it says where to look, and only compared bytes count.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from zipfile import ZipInfo

    from crcli.memory.weights.files import WeightsFile

WORD = 8
_HEADER_LIMIT = 64 << 20
_ITEM = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2}


class Region(NamedTuple):
    """A run of a file (bytes) in which one tensor lies, or several. `dtype` is empty where it is not known.

    `phases` are the distances from `start` (bytes, modulo 8) at which a row, and so a piece in memory, may
    begin; and that at which the words of the file itself lie, for programs that read files whole.
    """

    start: int
    end: int
    dtype: str
    phases: tuple[int, ...]


def regions(file: WeightsFile) -> list[Region]:
    """Divide a file: tensors where its format is known, the whole of it where not."""
    head = file.read(0, 16)
    for magic, parse in _FORMATS:
        if magic in head:
            try:
                found = sorted(parse(file))
            except Exception:  # the file may be anything: what does not parse is a run of bytes
                break
            if _is_sound(found, file.size):
                return found
    return [Region(0, file.size, "", tuple(range(WORD)))]


def _is_sound(found: list[Region], size: int) -> bool:
    """Whether regions lie in the file, one after another: what overlapped would be read many times."""
    at = 0
    for region in found:
        if (
            type(region.start) is not int
            or type(region.end) is not int
            or not at <= region.start < region.end
        ):
            return False
        at = region.end
    return bool(found) and at <= size


def _tensor(start: int, end: int, dtype: str, shape: tuple[int, ...]) -> Region:
    item = _ITEM.get(dtype, 1)
    row = item * (shape[-1] if len(shape) > 1 else 1 << 20)
    phases = {*range(0, WORD, math.gcd(row, WORD)), -start % WORD}
    return Region(start, end, dtype if dtype in _ITEM else "", tuple(sorted(phases)))


def _safetensors(file: WeightsFile) -> Iterator[Region]:
    (size,) = struct.unpack("<Q", file.read(0, 8))
    if size > min(_HEADER_LIMIT, file.size):
        raise ValueError("not a header of safetensors")
    header = json.loads(file.read(8, size))
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            if end > begin:
                yield _tensor(8 + size + begin, 8 + size + end, str(tensor["dtype"]), tuple(tensor["shape"]))


def _numpy(file: WeightsFile) -> Iterator[Region]:
    yield _numpy_at(file, 0, file.size)


def _numpy_at(file: WeightsFile, start: int, end: int) -> Region:
    import ast

    major = file.read(start, 8)[6]
    size_at, kind = start + 8, "<H" if major == 1 else "<I"
    (size,) = struct.unpack(kind, file.read(size_at, struct.calcsize(kind)))
    begin = size_at + struct.calcsize(kind) + size
    header = ast.literal_eval(file.read(begin - size, size).decode("latin-1"))
    dtype = {"<f4": "F32", "<f2": "F16", "<f8": "F64"}.get(header["descr"], "")
    return _tensor(begin, end, dtype, tuple(header["shape"]))


def _zip(file: WeightsFile) -> Iterator[Region]:
    """PyTorch's archives and NumPy's .npz: stored entries, each the bytes of one tensor."""
    import io
    import zipfile

    class Reader(io.RawIOBase):
        at = 0

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = offset + (0, self.at, file.size)[whence]
            return self.at

        def tell(self) -> int:
            return self.at

        def read(self, size: int = -1) -> bytes:
            left = max(0, file.size - self.at)
            data = file.read(self.at, left if size < 0 else min(size, left))
            self.at += len(data)
            return data

    try:
        entries = zipfile.ZipFile(Reader()).infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(str(error)) from error
    types = _storage_types(file, entries)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size:
            continue
        start = _begin_of(file, entry)
        if entry.filename.endswith(".npy"):
            yield _numpy_at(file, start, start + entry.file_size)
        else:
            dtype = types.get(entry.filename.rpartition("/")[2], "")
            yield _tensor(start, start + entry.file_size, dtype, ())


_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}


def _storage_types(file: WeightsFile, entries: list[ZipInfo]) -> dict[str, str]:
    """The types of PyTorch's storages by their keys, as its pickle names them; nothing of it is executed."""
    import pickletools

    found: dict[str, str] = {}
    for entry in entries:
        if not entry.filename.endswith("data.pkl"):
            continue
        kind, named, memo = "", "", dict[int, str]()
        for code, argument, _ in pickletools.genops(_pickle(file, entry)):
            if code.name == "GLOBAL":
                kind = named = _STORAGES.get(str(argument).rpartition(" ")[2], "")
            elif code.name in ("BINPUT", "LONG_BINPUT") and named:
                memo[int(str(argument))], named = named, ""
            elif code.name in ("BINGET", "LONG_BINGET"):
                kind = memo.get(int(str(argument)), kind)
            elif code.name == "BINUNICODE" and str(argument).isdecimal() and kind:
                found.setdefault(str(argument), kind)
    return found


def _pickle(file: WeightsFile, entry: ZipInfo) -> bytes:
    return file.read(_begin_of(file, entry), min(entry.file_size, _HEADER_LIMIT))


def _begin_of(file: WeightsFile, entry: ZipInfo) -> int:
    """Where the bytes of a stored entry begin."""
    name_size, extra_size = struct.unpack("<HH", file.read(entry.header_offset + 26, 4))
    return int(entry.header_offset + 30 + name_size + extra_size)


_GGML = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2), 28: ("F64", 8)}
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Gguf:
    """Reads the head of a GGUF file."""

    def __init__(self, file: WeightsFile) -> None:
        self.data = file.read(0, min(file.size, _HEADER_LIMIT))
        self.at = 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return int(value)

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def skip_value(self, kind: int) -> int:
        """Pass over a value; return it where it is a number of 32 bits."""
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.number("I"), self.number("Q")
            if inner in _GGUF_SIZES:
                self.at += _GGUF_SIZES[inner] * count
            else:
                for _ in range(min(count, len(self.data))):
                    self.skip_value(inner)
        else:
            value = self.number("I") if kind == 4 else 0
            self.at += 0 if kind == 4 else _GGUF_SIZES[kind]
            return value
        return 0


def _gguf(file: WeightsFile) -> Iterator[Region]:
    head = _Gguf(file)
    head.at = 8
    tensors, pairs, alignment = head.number("Q"), head.number("Q"), 32
    for _ in range(min(pairs, 1 << 20)):
        key = head.text()
        value = head.skip_value(head.number("I"))
        if key == "general.alignment":
            alignment = value
    found: list[tuple[int, str, tuple[int, ...]]] = []
    for _ in range(min(tensors, 1 << 20)):
        head.text()
        shape = tuple(head.number("Q") for _ in range(min(head.number("I"), 8)))
        dtype = _GGML.get(head.number("I"), ("", 1))[0]
        found.append((head.number("Q"), dtype, shape[::-1]))
    base = -(-head.at // alignment) * alignment
    found.sort()
    for number, (offset, dtype, shape) in enumerate(found):
        after = found[number + 1][0] if number + 1 < len(found) else file.size - base
        size = math.prod(shape) * _ITEM[dtype] if dtype else after - offset
        if size:
            yield _tensor(base + offset, base + offset + min(size, after - offset), dtype, shape)


_FORMATS: tuple[tuple[bytes, Callable[[WeightsFile], Iterator[Region]]], ...] = (
    (b"\x93NUMPY", _numpy),
    (b"PK\x03\x04", _zip),
    (b"GGUF", _gguf),
    (b'{"', _safetensors),
)

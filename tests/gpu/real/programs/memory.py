"""Memory of a GPU, by way of different libraries behind one small interface.

`torch` and `cupy` are what users have; `driver` is CUDA's driver API alone, through cuda-python, which the
simulator offers too; `host` is no GPU memory at all but a stand-in, to try everything around it without one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

PIECE = 64 << 20
"""The most that is copied back from a GPU at once to be hashed (bytes)."""


class Memory(Protocol):
    """Blocks of GPU memory by number. The first counts, in its first eight bytes."""

    def put(self, data: bytes | memoryview) -> None:
        """Have one block more, with these bytes."""

    def zeros(self, size: int) -> None:
        """Have one block more, all zeros."""

    def increment(self) -> None:
        """Add one to the counter."""

    def count(self) -> int:
        """The counter, as the GPU has it."""
        ...

    def pieces(self) -> Sequence[Callable[[], bytes]]:
        """All blocks in order, in pieces of at most PIECE bytes, each copied back when it is called."""
        ...

    def used(self) -> int:
        """Bytes of this GPU's memory in use, by whomever, as its library tells."""
        ...


def made(library: str, device: str) -> Memory:
    """The memory of this library, with the counter in it at zero."""
    memory: Memory = {"torch": TorchMemory, "cupy": CupyMemory, "driver": DriverMemory, "host": HostMemory}[
        library
    ](device)
    memory.zeros(8)
    return memory


def digest(memory: Memory, start: int = 0) -> str:
    """The digest of all blocks from this piece on: several pieces are copied back and hashed at once."""
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(
            lambda piece: hashlib.blake2b(piece(), digest_size=16).digest(), memory.pieces()[start:]
        )
        return hashlib.blake2b(b"".join(found), digest_size=16).hexdigest()


def random_bytes(seed: int, size: int) -> bytes:
    """Bytes that no compressor makes smaller, the same for the same seed."""
    return random.Random(seed).randbytes(size)


class TorchMemory:
    """Tensors of PyTorch on one device."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self.blocks: list[Any] = []

    def put(self, data: bytes | memoryview) -> None:
        """See Memory."""
        block = self._torch.frombuffer(bytearray(data), dtype=self._torch.uint8)
        self.blocks.append(block.to(self.device))

    def zeros(self, size: int) -> None:
        """See Memory."""
        self.blocks.append(self._torch.zeros(size, dtype=self._torch.uint8, device=self.device))

    def increment(self) -> None:
        """See Memory."""
        self.blocks[0].view(self._torch.int64).add_(1)

    def count(self) -> int:
        """See Memory."""
        return int(self.blocks[0].view(self._torch.int64).item())

    def pieces(self) -> Sequence[Callable[[], bytes]]:
        """See Memory."""
        flat = [block.view(self._torch.uint8).flatten() for block in self.blocks]
        parts = [block[at : at + PIECE] for block in flat for at in range(0, block.numel(), PIECE)]
        return [lambda part=part: part.cpu().numpy().data for part in parts]

    def used(self) -> int:
        """See Memory."""
        if self.device.type == "cpu":
            return sum(block.nbytes for block in self.blocks)
        free, total = self._torch.cuda.mem_get_info(self.device)
        return int(total - free)


class CupyMemory:
    """Arrays of CuPy."""

    def __init__(self, device: str) -> None:
        import cupy

        if device != "cuda":
            raise SystemExit("CuPy has no CPU")
        self._cupy = cupy
        self._blocks: list[Any] = []

    def put(self, data: bytes | memoryview) -> None:
        """See Memory."""
        import numpy

        self._blocks.append(self._cupy.asarray(numpy.frombuffer(data, numpy.uint8)))

    def zeros(self, size: int) -> None:
        """See Memory."""
        self._blocks.append(self._cupy.zeros(size, "uint8"))

    def increment(self) -> None:
        """See Memory."""
        count = self._blocks[0].view("int64")
        count += 1

    def count(self) -> int:
        """See Memory."""
        return int(self._blocks[0].view("int64")[0])

    def pieces(self) -> Sequence[Callable[[], bytes]]:
        """See Memory."""
        parts = [block[at : at + PIECE] for block in self._blocks for at in range(0, block.size, PIECE)]
        return [lambda part=part: part.get().data for part in parts]

    def used(self) -> int:
        """See Memory."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(total - free)


class DriverMemory:
    """Allocations of CUDA's driver API, through cuda-python."""

    def __init__(self, _device: str) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._call("cuCtxSetCurrent", self._context)
        self._blocks: list[tuple[Any, int]] = []

    def put(self, data: bytes | memoryview) -> None:
        """See Memory."""
        self._call("cuMemcpyHtoD", self._allocate(len(data)), bytes(data), len(data))

    def zeros(self, size: int) -> None:
        """See Memory."""
        self._call("cuMemsetD8", self._allocate(size), 0, size)

    def increment(self) -> None:
        """See Memory. One copy there and one back: no kernel, so that the simulator needs none."""
        self._call("cuMemcpyHtoD", self._blocks[0][0], (self.count() + 1).to_bytes(8, "little"), 8)

    def count(self) -> int:
        """See Memory."""
        return int.from_bytes(self._read(self._blocks[0][0], 0, 8), "little")

    def pieces(self) -> Sequence[Callable[[], bytes]]:
        """See Memory."""
        return [
            lambda start=start, at=at, size=size: self._read(start, at, min(PIECE, size - at))
            for start, size in self._blocks
            for at in range(0, size, PIECE)
        ]

    def used(self) -> int:
        """See Memory."""
        free, total = self._call("cuMemGetInfo")
        return int(total - free)

    def _allocate(self, size: int) -> Any:
        start = self._call("cuMemAlloc", size)
        self._blocks.append((start, size))
        return start

    def _read(self, start: Any, at: int, size: int) -> bytes:
        self._call("cuCtxSetCurrent", self._context)  # of this thread
        data = bytearray(size)
        self._call("cuMemcpyDtoH", data, self._driver.CUdeviceptr(int(start) + at), size)
        return bytes(data)

    def _call(self, name: str, *args: Any) -> Any:
        code, *found = getattr(self._driver, name)(*args)
        if int(code):
            raise SystemExit(f"{name}: {code.name} ({int(code)})")
        return found[0] if len(found) == 1 else tuple(found)


class HostMemory:
    """A stand-in: memory of the process itself."""

    def __init__(self, _device: str) -> None:
        self._blocks: list[bytearray] = []

    def put(self, data: bytes | memoryview) -> None:
        """See Memory."""
        self._blocks.append(bytearray(data))

    def zeros(self, size: int) -> None:
        """See Memory."""
        self._blocks.append(bytearray(size))

    def increment(self) -> None:
        """See Memory."""
        self._blocks[0][:] = (self.count() + 1).to_bytes(8, "little")

    def count(self) -> int:
        """See Memory."""
        return int.from_bytes(self._blocks[0], "little")

    def pieces(self) -> Sequence[Callable[[], bytes]]:
        """See Memory."""
        return [
            lambda block=block, at=at: bytes(memoryview(block)[at : at + PIECE])
            for block in self._blocks
            for at in range(0, len(block), PIECE)
        ]

    def used(self) -> int:
        """See Memory."""
        return sum(map(len, self._blocks))

"""What nothing can be faster than, in this run: bare steps, each by itself, on a subject's own bytes.

The copy is what a page server must do at least. Hash and compression go over pieces as large as crcli's
chunks, in one thread and in two; the disk is written and made durable in one go; boto3 moves one file as it
comes.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.bench import memory
from tests.bench.cold import forget
from tests.bench.commands import Ran, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.bench.commands import Subject
    from tests.support.s3servers import S3Server

PIECE = 256 << 10
LEVEL = 1


def of(subject: Subject, folder: Path, server: S3Server) -> dict[str, float]:
    """All limits for this subject; it has ended afterwards, so that its memory is there for the rest."""
    living = memory.TreeMemory(subject.pids())
    copied = memory.fresh(living.size)
    figures = {
        "memory_mib": living.size / 2**20,
        "copy_fresh_ms": living.copy(copied) * 1000,
        "copy_ms": living.copy(copied) * 1000,
    }
    subject.end()
    view = memoryview(copied)
    for cores in (1, 2):
        figures[f"hash_{cores}_s"] = _timed(view, cores, _hash_pieces)
        figures[f"zstd_{cores}_s"] = _timed(view, cores, _compress_pieces)
    data = folder / "bare"
    data.mkdir()
    path = data / "bytes"
    figures["write_s"] = write(path, view)
    view.release()
    del copied
    figures |= transfers(path, server, subject.limit_s)
    forget(data)
    figures["read_s"] = read(path)
    shutil.rmtree(data)
    return figures


def write(path: Path, data: memoryview) -> float:
    """Write a file and make it durable; return how many seconds it took."""
    os.sync()
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        at = 0
        while at < len(data):
            at += file.write(data[at:])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def read(path: Path) -> float:
    """Read a file once; return how many seconds it took."""
    buffer = bytearray(8 << 20)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def transfers(path: Path, server: S3Server, limit_s: float) -> dict[str, float]:
    """What boto3 needs to upload a file, and to download it to another."""
    sent = client("up", path, "bare/bytes", server, limit_s)
    fetched = client("down", path.with_name("fetched"), "bare/bytes", server, limit_s)
    return {"upload_s": float(sent.out), "upload_cpu_s": sent.cpu_s, "download_s": float(fetched.out)}


def client(direction: str, path: Path, key: str, server: S3Server, limit_s: float) -> Ran:
    """Run boto3's transfer manager on one file, in a process of its own (see client.py)."""
    command = [sys.executable, "-m", "tests.bench.client", direction, str(path), server.bucket, key]
    return run(command, limit_s, server.env)


def _timed(data: memoryview, cores: int, work: Callable[[memoryview], Any]) -> float:
    """Seconds that `work` needs for all bytes, shared between so many threads."""
    share = -(-len(data) // cores // PIECE) * PIECE
    parts = [data[at : at + share] for at in range(0, len(data), share)]
    with ThreadPoolExecutor(cores) as threads:
        began = time.perf_counter()
        list(threads.map(work, parts))
        took = time.perf_counter() - began
    for part in parts:
        part.release()
    return took


def _hash_pieces(data: memoryview) -> None:
    from blake3 import blake3

    for at in range(0, len(data), PIECE):
        blake3(data[at : at + PIECE]).digest()


def _compress_pieces(data: memoryview) -> None:
    from zstandard import ZstdCompressor

    compressor = ZstdCompressor(level=LEVEL)
    for at in range(0, len(data), PIECE):
        compressor.compress(data[at : at + PIECE])

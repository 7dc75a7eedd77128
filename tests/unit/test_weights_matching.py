"""Memory found in files of weights: whatever is found is equal, and what should be found is."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crcli import kernel
from crcli.memory.blocks import Run
from crcli.memory.extents import PAGE, SpaceKey, SpaceKind
from crcli.memory.weights import cache, layout, samples
from crcli.memory.weights.files import WeightsFile
from crcli.memory.weights.match import Matcher, _Cover
from crcli.memory.weights.references import Piece, Reference, found_bytes
from crcli.memory.weights.samples import Index, index_of
from crcli.memory.weights.views import View, apply
from crcli.pipeline import weights
from crcli.pipeline.dump import _times_to_read

SPACE = SpaceKey(SpaceKind.PROCESS, 4711)
BLOCK_PAGES = 256
JUNK = np.random.default_rng(7).bytes(3000)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    """A tensor as models have them."""
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def bf16(tensor: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as 16-bit words."""
    words = tensor.view(np.uint32)
    return ((words + ((words >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)


def safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]], pad: int = 0) -> Path:
    """Write a file of safetensors; `pad` shifts its data."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, tensor) in tensors.items():
        shape = list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode() + b" " * pad
    data = b"".join(tensor.tobytes() for _, tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def found_in(memory: bytes, *paths: Path) -> tuple[int, list[Piece]]:
    """Match memory, and compare what is found; return how many pages are, and the pieces."""
    files = [WeightsFile(str(path)) for path in paths]
    matcher = Matcher(files, Index.joined([index_of(file)[0] for file in files]))
    memory += bytes(-len(memory) % PAGE)
    total, pieces = 0, list[Piece]()
    for first in range(0, len(memory) // PAGE, BLOCK_PAGES):
        block = bytearray(memory[first * PAGE : (first + BLOCK_PAGES) * PAGE])
        runs = [Run(SPACE, 1000 + first, len(block) // PAGE, True, 0)]
        end = 0
        for stretch in matcher.stretches(block, runs):
            assert stretch.at >= end and stretch.pages > 0
            end = stretch.at + stretch.pages
            made = b"".join(remade(files[piece.file], piece) for piece in stretch.pieces)
            assert made == block[stretch.at * PAGE : end * PAGE]
            total += stretch.pages
            pieces += stretch.pieces
    matcher.close()
    return total, pieces


def remade(file: WeightsFile, piece: Piece) -> bytes:
    """A piece's bytes of memory, made from the file alone."""
    return bytes(apply(piece.view, file.read(piece.offset, piece.end - piece.offset)).tobytes())


def share(memory: bytes, *paths: Path) -> float:
    """How much of memory is found."""
    return found_in(memory, *paths)[0] * PAGE / len(memory)


TENSORS = {f"layer.{number}": normal(256, 512, seed=number) for number in range(4)}
ALL = b"".join(tensor.tobytes() for tensor in TENSORS.values())


@pytest.fixture
def float32(tmp_path: Path) -> Path:
    """Four tensors of float32."""
    return safetensors(tmp_path / "f32.safetensors", {n: ("F32", t) for n, t in TENSORS.items()})


@pytest.mark.parametrize("shift", [0, 8, 64, 4095, 4096])
def test_a_file_is_found_whatever_its_alignment(float32: Path, shift: int) -> None:
    """Memory that holds all tensors, shifted against the file and the pages, is found but for its ends."""
    if shift % 8:
        memory = bytes(8) + ALL  # memory is aligned; what lies at odd places is the file
        path = safetensors(float32.parent / "odd", {n: ("F32", t) for n, t in TENSORS.items()}, pad=shift)
    else:
        memory, path = JUNK[:shift] + ALL, float32
    assert share(memory, path) > 0.98


def test_tensors_are_found_one_by_one(float32: Path) -> None:
    """Tensors in another order, with headers of an allocator between them."""
    memory = b"".join(JUNK[: 16 * n] + TENSORS[name].tobytes() for n, name in enumerate(reversed(TENSORS)))
    assert share(memory, float32) > 0.97


def test_rows_are_found_in_any_order(float32: Path) -> None:
    """Halves of tensors as tensor parallelism cuts them, columns too, and rows that are fused or permuted."""
    rows = [tensor[128:] for tensor in TENSORS.values()]
    assert share(b"".join(half.tobytes() for half in rows), float32) > 0.97
    wide = normal(64, 4096, seed=9)
    path = safetensors(float32.parent / "wide", {"w": ("F32", wide)})
    columns = np.ascontiguousarray(wide[:, 2048:])
    assert share(columns.tobytes(), path) > 0.95
    order = np.random.default_rng(3).permutation(64)
    assert share(wide[order].tobytes(), path) > 0.95
    fused = np.concatenate([wide, wide[::-1]])
    assert share(fused.tobytes(), path) > 0.95


CASTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "float32 to bfloat16": ("F32", lambda t: t, bf16),
    "float32 to float16": ("F32", lambda t: t, lambda t: t.astype(np.float16)),
    "bfloat16 to float32": ("BF16", bf16, lambda t: bf16(t).astype(np.uint32) << 16),
    "float16 to float32": (
        "F16",
        lambda t: t.astype(np.float16),
        lambda t: t.astype(np.float16).astype(np.float32),
    ),
    "float64 to float32": ("F64", lambda t: t.astype(np.float64), lambda t: t),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_recognised(cast: str, tmp_path: Path) -> None:
    """A tensor that was cast when it was loaded is found, and is made again from the file."""
    dtype, written, loaded = CASTS[cast]
    tensors = {name: (dtype, written(tensor)) for name, tensor in TENSORS.items()}
    path = safetensors(tmp_path / "w", tensors)
    memory = JUNK[:64] + b"".join(loaded(tensor).tobytes() for tensor in TENSORS.values())
    pages, pieces = found_in(memory, path)
    assert pages * PAGE / len(memory) > 0.97
    assert {piece.view for piece in pieces} != {View.BYTES}


def distributions() -> dict[str, bytes]:
    """Bytes as weights of every kind have them."""
    source = np.random.default_rng(5)
    size = 1 << 20
    return {
        "float16": normal(size // 2).astype(np.float16).tobytes(),
        "bfloat16": bf16(normal(size // 2)).tobytes(),
        "bfloat16 kept as float32": (bf16(normal(size // 4)).astype(np.uint32) << 16).tobytes(),
        "fp8": source.integers(0x20, 0x60, size, dtype=np.uint8).tobytes(),
        "int8": np.clip(source.normal(0, 20, size), -127, 127).astype(np.int8).tobytes(),
        "4 bits": source.integers(0, 256, size, dtype=np.uint8).tobytes(),
        "sparse": np.where(source.random(size // 4) < 0.05, normal(size // 4), 0)
        .astype(np.float32)
        .tobytes(),
        "repeated rows": np.tile(normal(16, 1024), (16, 1)).tobytes(),
    }


@pytest.mark.parametrize("kind", distributions())
def test_every_distribution_is_sampled(kind: str, tmp_path: Path) -> None:
    """A file without a format, its tensor at an odd place, is found whatever its values are like."""
    data = distributions()[kind]
    path = tmp_path / "w"
    path.write_bytes(b"abc" + data)
    assert share(data, path) > 0.9


def test_what_differs_is_never_left_out(float32: Path) -> None:
    """Weights that a training step has changed, a bit in each page of half of them, are found where equal."""
    memory = bytearray(ALL)
    for at in range(0, len(memory) // 2, PAGE):
        memory[at + 123] ^= 1
    pages, _ = found_in(bytes(memory), float32)
    assert 0.45 < pages * PAGE / len(memory) <= 0.5


def test_near_matches_cost_little_and_give_nothing(float32: Path) -> None:
    """Memory that is like the file everywhere and equal nowhere for a page is given up, block by block."""
    memory = bytearray(ALL)
    for at in range(0, len(memory), 100):
        memory[at] ^= 1
    assert found_in(bytes(memory), float32) == (0, [])


@pytest.mark.parametrize("block", [bytes(8), b"\x01" * 8, struct.pack("<d", 1.5), bytes(range(64))])
def test_a_file_of_one_block_repeated_is_harmless(block: bytes, tmp_path: Path) -> None:
    """Neither the index grows with it, nor is anything found that is not equal; zeros are not looked for."""
    path = tmp_path / "w"
    path.write_bytes(block * (2 << 20 >> 3))
    index, _ = index_of(WeightsFile(str(path)))
    assert len(index.keys) < 1000
    found_in(block * (1 << 17), path)
    assert found_in(bytes(1 << 20), path)[0] == 0


def test_files_may_share_tensors(float32: Path) -> None:
    """Of two files with the same tensors either is as good."""
    twin = safetensors(float32.parent / "twin", {n: ("F32", t) for n, t in reversed(TENSORS.items())})
    assert share(ALL, float32, twin) > 0.99


def edits() -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Pieces of a file (begin, length), each at a place of memory."""
    return st.lists(
        st.tuples(st.integers(0, len(ALL) - 1), st.integers(1, 100_000), st.integers(0, 1 << 19)), max_size=8
    )


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits(), st.lists(st.integers(0, (1 << 20) - 1), max_size=5))
def test_any_memory_is_made_again_as_it_was(
    float32: Path, pieces: list[tuple[int, int, int]], flips: list[int]
) -> None:
    """Whatever pieces of a file lie wherever in memory, and whatever bits were changed in them."""
    memory = bytearray(1 << 20)
    for begin, length, place in pieces:
        piece = ALL[begin : begin + length]
        memory[place : place + len(piece)] = piece
    for at in flips:
        memory[at] ^= 4
    found_in(bytes(memory), float32)  # which compares


def archive(path: Path, tensors: Sequence[np.ndarray]) -> Path:
    """A zip as NumPy and PyTorch write them: stored entries."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for number, tensor in enumerate(tensors):
            file.writestr(f"archive/data/{number}", tensor.tobytes())
    return path


def gguf(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file of float32 tensors, with one pair of each kind in its head."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    pairs = text("general.name") + struct.pack("<I", 8) + text("test")
    pairs += text("general.alignment") + struct.pack("<II", 4, 64)
    pairs += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    infos, data = b"", b""
    for name, tensor in tensors.items():
        infos += text(name) + struct.pack("<I2Q", 2, *tensor.shape[::-1]) + struct.pack("<IQ", 0, len(data))
        data += tensor.tobytes() + bytes(-tensor.nbytes % 64)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3) + pairs + infos
    path.write_bytes(head + bytes(-len(head) % 64) + data)
    return path


def test_the_usual_formats_are_understood(tmp_path: Path, float32: Path) -> None:
    """Each gives a region for each tensor, with its type where the format has it."""
    np.save(tmp_path / "one.npy", TENSORS["layer.0"])
    np.savez(tmp_path / "all.npz", **TENSORS)
    formats = {
        float32: ["F32"] * 4,
        tmp_path / "one.npy": ["F32"],
        tmp_path / "all.npz": ["F32"] * 4,
        archive(tmp_path / "zip", list(TENSORS.values())): [""] * 4,
        gguf(tmp_path / "gguf", TENSORS): ["F32"] * 4,
    }
    for path, types in formats.items():
        regions = layout.regions(WeightsFile(str(path)))
        assert [region.dtype for region in regions] == types, path
        assert [region.end - region.start for region in regions] == [TENSORS["layer.0"].nbytes] * len(types)
        memory = TENSORS["layer.0"].tobytes()
        assert share(memory, path) > 0.97, path


@pytest.mark.parametrize("length", [0, 1, 8, 16, 40, 4000])
def test_a_damaged_head_is_no_head(length: int, float32: Path, tmp_path: Path) -> None:
    """Files that are cut short or lie about themselves are runs of bytes, and break nothing."""
    for number, source in enumerate((float32, gguf(tmp_path / "g", TENSORS))):
        path = tmp_path / f"cut-{number}"
        path.write_bytes(source.read_bytes()[:length])
        index_of(WeightsFile(str(path)))
    liar = tmp_path / "liar"
    liar.write_bytes(
        struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}} ' + ALL
    )
    assert layout.regions(WeightsFile(str(liar)))[0] == (0, liar.stat().st_size, "", tuple(range(8)))
    assert share(ALL, liar) > 0.97


@pytest.mark.parametrize("lost", ["", "one", "stopped", "all"])
def test_processes_take_the_samples_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """What they send is what this process would have found, also where some are killed or stopped, or none
    may be started."""
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(3).bytes(40 << 20))
    file = WeightsFile(str(path))
    expected = index_of(file)
    monkeypatch.setattr(samples, "_WORTH_BYTES", 1 << 20)
    monkeypatch.setattr(samples, "usable_processors", lambda: 3)
    forks, fork = [], kernel.quiet_fork

    def forking() -> int:
        if lost == "all":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forks.append(fork())
        if forks[-1] and lost in ("one", "stopped") and len(forks) == 2:
            os.kill(forks[-1], signal.SIGKILL if lost == "one" else signal.SIGSTOP)
        return forks[-1]

    monkeypatch.setattr(kernel, "quiet_fork", forking)
    index, digest = index_of(file)
    assert len(forks) == (0 if lost == "all" else 3)
    assert digest == expected[1] == blake3(path.read_bytes()).digest()
    assert index.streams == expected[0].streams
    for name in ("keys", "owners", "places"):
        assert np.array_equal(getattr(index, name), getattr(expected[0], name))
    for pid in forks:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)


def test_for_a_small_file_nobody_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process works on it; folders of models have hundreds of such files."""
    waits: list[object] = []
    monkeypatch.setattr(samples.select, "select", lambda *about: waits.append(about) or ([], [], []))
    path = tmp_path / "small"
    path.write_bytes(JUNK)
    index_of(WeightsFile(str(path)))
    assert not waits


def test_what_was_covered_leaves_nothing_for_a_collection(float32: Path) -> None:
    """Processes that look ahead never collect garbage: each block would take memory there for good."""
    memory = bytearray(float32.read_bytes()[: 16 * PAGE])
    file = WeightsFile(str(float32))
    matcher = Matcher([file], Index.joined([index_of(file)[0]]))
    gc.collect()
    gc.disable()
    try:
        assert matcher.stretches(memory, [Run(SPACE, 0, 16, True, 0)])
        assert not [one for one in gc.get_objects() if isinstance(one, _Cover)]
    finally:
        gc.enable()
        matcher.close()


def test_of_many_files_fewer_samples_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no more in all than there may be, and large tensors of each file are found by them."""
    monkeypatch.setattr(weights, "MOST_SAMPLES", 4000)
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(tmp_path / "cache"))
    contents = [np.random.default_rng(seed).bytes(8 << 20) for seed in range(3)]
    paths = []
    for number, raw in enumerate(contents):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(raw)
    with weights.WeightsInUse([str(path) for path in paths]) as in_use:
        in_use.index()
        assert in_use.matcher is not None
        assert 1000 < len(in_use.matcher._index.keys) <= 4000
        assert sum(one["samples"] for one in in_use.facts()) > 8000
        for raw in contents:
            block = bytearray(raw[: BLOCK_PAGES * PAGE])
            found = in_use.matcher.stretches(block, [Run(SPACE, 0, BLOCK_PAGES, True, 0)])
            assert sum(one.pages for one in found) == BLOCK_PAGES


def test_what_cannot_be_read_in_time_is_left_out(float32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is not compared with once its time is over, also where its index is kept and only to be read."""
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(float32.parent / "cache"))
    for until in (None, time.monotonic() + 1000):
        with weights.WeightsInUse([str(float32)]) as in_use:
            in_use.index(until=until)
            assert len(in_use.facts()) == 1 and not list(in_use.findings())
    for only_kept in (False, True):
        with weights.WeightsInUse([str(float32)]) as in_use:
            in_use.index(until=time.monotonic() - 1, only_kept=only_kept)
            (finding,) = in_use.findings()
            assert not in_use.facts() and in_use.matcher is None
            assert finding.name == "weights-left-out" and finding.evidence["paths"] == [str(float32)]


def test_an_index_is_read_piece_by_piece(float32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a large one can end that in the middle."""
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(float32.parent / "cache"))
    monkeypatch.setattr(cache, "_PIECE", 100)
    file = WeightsFile(str(float32))
    file._is_fresh = False
    first, looks = cache.indexed(file), list[int]()

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        cache.kept(file, look)
    again = cache.kept(file)
    assert again is not None and np.array_equal(again.samples.keys, first.samples.keys)
    file.close()


def test_weights_and_hashes_share_a_tenth_of_the_time() -> None:
    """However long the first take, the others end with the same tenth, and have a part of it in any case."""
    before = time.monotonic()
    for_weights, for_hashes = _times_to_read(100.0)
    assert for_weights is not None and for_hashes is not None
    assert before < for_weights < for_hashes <= time.monotonic() + 10
    assert _times_to_read(None) == (None, None)


def test_a_file_that_shrinks_is_no_danger(float32: Path) -> None:
    """Cut short between the index and the comparison: less is found, nothing breaks, the change is seen."""
    file = WeightsFile(str(float32))
    matcher = Matcher([file], Index.joined([index_of(file)[0]]))
    os.truncate(float32, float32.stat().st_size // 2)
    block = bytearray(ALL[: BLOCK_PAGES * PAGE])
    assert matcher.stretches(block, [Run(SPACE, 0, BLOCK_PAGES, True, 0)])
    end = bytearray(ALL[-BLOCK_PAGES * PAGE :])
    assert matcher.stretches(end, [Run(SPACE, 9000, BLOCK_PAGES, True, 0)]) == []
    assert matcher.changed() == {0}


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "read": (Path.read_bytes, False),
    "written to": (lambda path: path.open("ab").write(b"more"), True),
    "cut": (lambda path: os.truncate(path, 1000), True),
    "replaced": (lambda path: os.replace(safetensors(path.parent / "new", {}), path), True),
    "removed": (Path.unlink, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_file_are_seen(change: str, float32: Path) -> None:
    """Written to, cut, replaced, removed; not when it was only read."""
    file = WeightsFile(str(float32))
    file._is_fresh = False
    do, is_change = CHANGES[change]
    do(float32)
    assert file.has_changed() == is_change


def test_a_file_that_was_written_a_moment_ago_is_not_believed(float32: Path) -> None:
    """Within a tick of the clock it may change again without its times showing it."""
    float32.touch()
    assert WeightsFile(str(float32)).has_changed()


def test_an_index_is_kept_for_the_same_file_only(float32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it is read from the cache; a damaged entry, or a changed file, is indexed again."""
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(float32.parent / "cache"))
    file = WeightsFile(str(float32))
    file._is_fresh = False
    first = cache.indexed(file)
    assert first.digest == blake3(float32.read_bytes()).hexdigest()
    again = cache.kept(file)
    assert again is not None and again.digest == first.digest
    assert np.array_equal(again.samples.keys, first.samples.keys)
    assert np.array_equal(again.samples.places, first.samples.places)
    assert again.samples.streams == first.samples.streams
    (entry,) = (float32.parent / "cache" / "weights").iterdir()
    entry.write_bytes(entry.read_bytes()[:-40] + bytes(40))
    assert cache.kept(file) is None
    float32.write_bytes(b"another")
    assert cache.kept(WeightsFile(str(float32))) is None


def test_what_was_found_counts_once() -> None:
    """Bytes of memory add up; bytes of the file are counted once, casts by what they read."""
    references = [
        Reference((Piece(0, View.BYTES, 0, 4096), Piece(1, View.F32_TO_BF16, 100, 4096)), 8192, b""),
        Reference((Piece(0, View.BYTES, 2048, 4096),), 4096, b""),
    ]
    assert found_bytes(references) == {0: (8192, 6144), 1: (4096, 8192)}

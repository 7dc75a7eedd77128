"""Weights left out of images of real processes: nothing stored twice, and no byte wrong, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.crcli import COMMAND_LIMIT_SECONDS, Crcli, crcli_in, wait_until
from tests.support.programs import Program, spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

MIB = 1 << 20
WEIGHTS_BYTES = 24 * MIB

LOADED = """
    import hashlib, mmap, os, signal, sys, time
    path, how = {path!r}, {how!r}
    size = os.path.getsize(path)
    kind = mmap.MAP_SHARED if how == "shared" else mmap.MAP_PRIVATE
    memory = mmap.mmap(-1, size + (1 << 20), flags=kind | mmap.MAP_ANONYMOUS)
    with open(path, "rb", buffering=0) as file:
        file.readinto(memoryview(memory)[64 : 64 + size])
    state = bytearray(os.urandom(1 << 20))
    if how == "trained":
        for at in range(0, size, 4 << 20):
            memory[at + 70] ^= 1
    if how == "forked" and os.fork() == 0:
        while True: time.sleep(60)

    def look(*_):
        digest = hashlib.blake2b(memory, digest_size=8)
        digest.update(state)
        print("hash=" + digest.hexdigest(), flush=True)

    signal.signal(signal.SIGUSR1, look)
    look()
    print("ready")
    while True: time.sleep(0.01)
    """
"""Reads a file into memory of its own, beside other state; prints the hash of both, and again on SIGUSR1."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of random weights, in safetensors."""
    data = np.random.default_rng(1).standard_normal(WEIGHTS_BYTES // 4).astype(np.float32)
    tensor = {"dtype": "F32", "shape": [WEIGHTS_BYTES // 4096, 1024], "data_offsets": [0, data.nbytes]}
    head = json.dumps({"model": tensor}).encode()
    path = tmp_path / "models" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data.tobytes())
    time.sleep(0.1)  # older than a tick of the clock: see WeightsFile
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes are kept where nobody else looks."""
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(tmp_path / "cache"))


@contextmanager
def loaded(path: Path, how: str = "private") -> Iterator[Program]:
    """A process that has read the file, and does not have it open."""
    with spawn_python(LOADED.format(path=str(path), how=how)) as program:
        yield program


def assert_whole(program: Program, report: dict[str, Any]) -> None:
    """Ask a restored process for the hash of its memory, which must be what it was."""
    before = program.output.count("hash=")
    os.kill(report["host_pid"], 10)
    wait_until(lambda: program.output.count("hash=") > before, "it does not answer")
    assert len({line for line in program.output.splitlines() if line.startswith("hash=")}) == 1


@pytest.mark.parametrize("how", ["private", "shared"])
def test_weights_are_left_out_and_come_back(how: str, crcli: Crcli, weights: Path) -> None:
    """The image stores what is not weights; the restored memory is equal, byte for byte."""
    with loaded(weights, how) as program:
        done = crcli.dump(program.pid, "--weights", str(weights.parent))
        assert done["weights_bytes"] >= WEIGHTS_BYTES - MIB
        assert done["stored_bytes"] < 8 * MIB
        assert done["weights"][0]["path"] == str(weights)
        assert done["weights"][0]["found_bytes"] >= WEIGHTS_BYTES - MIB
        assert_whole(program, crcli.restore(done["image"]))
    shown = crcli.run("show", done["image"], "--store", crcli.store, "--json").json
    assert shown["weights"] == done["weights"] and shown["weights_bytes"] == done["weights_bytes"]
    verified = crcli.run("verify", done["image"], "--store", crcli.store, "--json").json
    assert verified["weights_bytes"] > 0 and verified["damage"] == []


def test_auto_finds_what_the_tree_names(crcli: Crcli, weights: Path, tmp_path: Path) -> None:
    """Files in the folder that the environment calls the model cache are found without being named."""
    environment = os.environ | {"HF_HOME": str(weights.parent), "HOME": str(tmp_path)}
    with spawn_python(LOADED.format(path=str(weights), how="private"), env=environment) as program:
        done = crcli.dump(program.pid, "--weights", "auto")
        assert done["weights_bytes"] >= WEIGHTS_BYTES - MIB
        assert_whole(program, crcli.restore(done["image"]))


def test_what_was_trained_since_is_stored(crcli: Crcli, weights: Path) -> None:
    """Pages that differ from the file in one bit are stored; the others are not."""
    with loaded(weights, "trained") as program:
        done = crcli.dump(program.pid, "--weights", str(weights))
        assert WEIGHTS_BYTES - MIB <= done["weights_bytes"] < WEIGHTS_BYTES
        assert_whole(program, crcli.restore(done["image"]))


def test_memory_shared_since_a_fork_stays_shared(crcli: Crcli, weights: Path) -> None:
    """Parent and child, who share the weights, need no more memory after a restore than before."""
    with loaded(weights, "forked") as program:
        report = crcli.restore(crcli.dump(program.pid, "--weights", str(weights))["image"])
        assert_whole(program, report)
        lines = Path(f"/proc/{report['host_pid']}/smaps_rollup").read_text().splitlines()
        shared = next(int(line.split()[1]) for line in lines if line.startswith("Shared_Dirty"))
        assert shared << 10 >= WEIGHTS_BYTES - 2 * MIB


def other_byte(path: Path) -> None:
    """Alter one byte in the middle, and nothing that a listing shows."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(WEIGHTS_BYTES // 2)
        byte = file.read(1)[0] ^ 1
        file.seek(WEIGHTS_BYTES // 2)
        file.write(bytes([byte]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def link_to_another(path: Path) -> None:
    """Replace it by a link to another file of the same size."""
    other = path.with_name("other.bin")
    other.write_bytes(os.urandom(path.stat().st_size))
    path.unlink()
    path.symlink_to(other)


def cut(path: Path) -> None:
    """Leave half of it."""
    os.truncate(path, WEIGHTS_BYTES // 2)


@pytest.mark.parametrize(
    ("change", "code"), [(other_byte, 22), (link_to_another, 22), (Path.unlink, 20), (cut, 20)]
)
def test_a_file_that_is_not_what_it_was_is_refused(
    change: Callable[[Path], object], code: int, crcli: Crcli, weights: Path
) -> None:
    """Altered in one byte, replaced, removed or cut: named, and nothing is started."""
    with loaded(weights) as program:
        image = crcli.dump(program.pid, "--weights", str(weights))["image"]
        kept = weights.with_name("kept")
        shutil.copy(weights, kept)
        change(weights)
        error = crcli.run("restore", image, "--store", crcli.store, "--json", code=code).json["error"]
        assert str(weights) in error["message"]
        assert not os.path.exists(f"/proc/{program.pid}")
        report = crcli.restore(image, "--weights-map", f"{weights}={kept}")
        assert_whole(program, report)


def test_files_are_found_elsewhere(crcli: Crcli, weights: Path, tmp_path: Path) -> None:
    """Under another folder by --weights-map, under any name in the folders of the configuration."""
    with loaded(weights) as program:
        image = crcli.dump(program.pid, "--weights", str(weights))["image"]
        moved = tmp_path / "mnt" / "deep"
        moved.parent.mkdir()
        weights.parent.rename(moved)
        crcli.restore(image, code=20)
        assert_whole(program, crcli.restore(image, "--weights-map", f"{weights.parent}={moved}"))
        crcli.clean_up()
        (moved / weights.name).rename(moved / "another-name")
        config = tmp_path / "config.yaml"
        config.write_text(f"weights: [{tmp_path}/mnt]\n")
        found = crcli.run("check", image, "--store", crcli.store, "--json", code=20).json["findings"]
        assert "weights-missing" in {finding["name"] for finding in found}
        os.environ["CRCLI_CONFIG"] = str(config)
        try:
            crcli.run("check", image, "--store", crcli.store)
            assert_whole(program, crcli.restore(image))
        finally:
            del os.environ["CRCLI_CONFIG"]


def test_pushed_weights_need_no_file(crcli: Crcli, weights: Path, tmp_path: Path) -> None:
    """A node without the file takes it from the store; so does one that has the image from a copy."""
    other = f"file://{tmp_path}/other"
    with loaded(weights) as program:
        image = crcli.dump(program.pid, "--weights", str(weights))["image"]
        pushed = crcli.run("weights", "push", str(weights), "--store", crcli.store, "--json").json
        assert pushed["files"][0]["stored_bytes"] >= WEIGHTS_BYTES
        crcli.run("gc", "--grace", "0", "--store", crcli.store)
        crcli.run("cp", image, other, "--store", crcli.store)
        weights.unlink()
        assert_whole(program, crcli.restore(image))
        crcli.clean_up()
        again = crcli.run("restore", image, "--store", other, "--json").json
        crcli.adopt(again["host_pid"])
        assert_whole(program, again)
        digest = pushed["files"][0]["digest"]
        crcli.run("weights", "rm", digest[:8], "--store", crcli.store)
        crcli.run("gc", "--grace", "0", "--store", crcli.store)
        crcli.run("restore", image, "--store", crcli.store, code=20)


def test_a_file_that_changes_during_the_dump_is_not_relied_on(crcli: Crcli, weights: Path) -> None:
    """Written to while the dump reads it: whatever is in the image brings the memory back."""
    with loaded(weights) as program:
        for moment in (0.05, 0.2, 0.3, 0.4, 0.5):
            command = ("dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json")
            with crcli.start(*command, "--name", "changing", "--weights", str(weights)) as dump:
                time.sleep(moment)
                kept = weights.read_bytes()
                other_byte(weights)
                out, err = dump.communicate(timeout=COMMAND_LIMIT_SECONDS)
            assert dump.returncode == 0, out + err
            done = json.loads(out)
            if done["weights_bytes"]:  # all was read before, or the new bytes were compared with memory
                weights.write_bytes(kept)
            with crcli_in(crcli.folder / f"restore-{moment}") as elsewhere:
                report = elsewhere.run("restore", done["image"], "--store", crcli.store, "--json").json
                elsewhere.adopt(report["host_pid"])
                assert_whole(program, report)
            weights.write_bytes(kept)
            time.sleep(0.1)


def test_shards_of_one_size_are_told_apart(crcli: Crcli, tmp_path: Path) -> None:
    """Two files of the same size under other names: each piece of memory finds the one that it is of."""
    folder = tmp_path / "shards"
    folder.mkdir()
    data = np.random.default_rng(4).bytes(8 * MIB)
    for number in (1, 2):
        (folder / f"shard-{number}").write_bytes(data[(number - 1) * 4 * MIB + 8 : number * 4 * MIB + 8 - 16])
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join((folder / f"shard-{number}").read_bytes() for number in (1, 2)))
    time.sleep(0.1)
    with loaded(whole) as program:
        done = crcli.dump(program.pid, "--weights", str(folder))
        assert done["weights_bytes"] > 7 * MIB
        (folder / "shard-1").rename(folder / "a")
        (folder / "shard-2").rename(folder / "shard-1")
        config = tmp_path / "config.yaml"
        config.write_text(f"weights: {folder}\n")
        os.environ["CRCLI_CONFIG"] = str(config)
        try:
            assert_whole(program, crcli.restore(done["image"]))
        finally:
            del os.environ["CRCLI_CONFIG"]


def test_only_what_is_used_is_asked_for(crcli: Crcli, weights: Path) -> None:
    """Of a folder of models an image names those that it refers to; odd things in there do no harm."""
    folder = weights.parent
    (folder / "other.safetensors").write_bytes(os.urandom(MIB))
    for number, head in enumerate(
        (b"\x93NUMPY\1\0\x10\0{(bad", b"GGUF", b"PK\3\4", struct.pack("<Q", 9) + b'{"w": [1]}')
    ):
        (folder / f"odd-{number}").write_bytes(head + bytes(70_000))
    os.mkfifo(folder / "fifo.bin")
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    with loaded(weights) as program:
        done = crcli.dump(program.pid, "--weights", str(folder))
        assert len(done["weights"]) == 6
        shown = crcli.run("show", done["image"], "--store", crcli.store, "--json").json
        assert [file["path"] for file in shown["weights"]] == [str(weights)]
        for path in (folder / "other.safetensors", folder / "odd-0"):
            path.unlink()
        assert_whole(program, crcli.restore(done["image"]))


def test_an_index_that_takes_too_long_is_left_out(crcli: Crcli, weights: Path) -> None:
    """With a deadline the dump goes on without files that are not indexed in time, and says so."""
    sparse = weights.with_name("huge.bin")
    with sparse.open("wb") as file:
        file.truncate(64 << 30)
    with loaded(weights) as program:
        done = crcli.dump(program.pid, "--weights", str(sparse), "--deadline", "30")
        assert done["weights_bytes"] == 0
        (finding,) = [one for one in done["findings"] if one["name"] == "weights-left-out"]
        assert finding["evidence"]["paths"] == [str(sparse)]
        assert_whole(program, crcli.restore(done["image"]))


TORCH = """
    import hashlib, os, signal, sys, time
    import torch
    path = {path!r}
    torch.manual_seed(1)
    layers = [torch.nn.Linear(512, 512) for _ in range(8)]
    model = torch.nn.Sequential(*layers)
    if not os.path.exists(path):
        torch.save(model.state_dict(), path)
        os._exit(0)
    model.load_state_dict(torch.load(path))
    def look(*_):
        digest = hashlib.blake2b(digest_size=8)
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        print("hash=" + digest.hexdigest(), flush=True)
    signal.signal(signal.SIGUSR1, look)
    look()
    print("ready")
    while True: time.sleep(0.01)
    """


def test_a_model_of_pytorch_is_left_out(crcli: Crcli, tmp_path: Path) -> None:
    """`torch.load` copies tensors one by one into memory of its own; they are found there."""
    pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    code = TORCH.format(path=str(path))
    with spawn_python(code, ready_line="") as writer:
        assert writer.process.wait(60) == 0
    time.sleep(0.1)
    with spawn_python(code) as program:
        done = crcli.dump(program.pid, "--weights", str(path))
        assert done["weights"][0]["found_bytes"] > 0.95 * path.stat().st_size
        assert_whole(program, crcli.restore(done["image"]))

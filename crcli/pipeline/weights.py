"""The files of weights that a dump compares memory with, opened and indexed before anything is frozen."""

from __future__ import annotations

import glob
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from crcli.errors import UsageError
from crcli.findings import Finding, Severity
from crcli.image.manifest import Weights, load
from crcli.image.weights import push, weights_report
from crcli.memory.weights.files import WeightsFile, files_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crcli.image.names import ImageRef
    from crcli.image.weights import Pushed
    from crcli.memory.weights.match import Matcher
    from crcli.process.evidence import Evidence
    from crcli.store.base import Store

AUTO = "auto"
SMALLEST_BYTES = 64 << 10
"""Smaller files are not worth a reference (bytes); nor are whole folders of them."""

SUFFIXES = (
    ".safetensors", ".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".onnx", ".data",
    ".h5", ".msgpack", ".tflite", ".pdparams", ".weights",
)  # fmt: skip
"""What files of weights are usually called."""

_CACHES = (
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "TORCH_HOME", "OLLAMA_MODELS",
    "LLAMA_CACHE", "MODEL_DIR", "VLLM_CACHE_ROOT",
)  # fmt: skip
"""Variables in a process's environment that lead to folders of models."""

_ON_GPUS = 16 << 30
"""What a tree that uses GPUs may have there, as far as is known when files are looked for (bytes)."""

MOST_FILES = 256
"""Files that one dump compares with, the largest: each is open all the time."""

MOST_SAMPLES = 8 << 20
"""Samples of all files together, at most (160 MB): of 16 GiB all that there are, of more a part."""

_MOST_ENTRIES = 10_000
_NAMED = 20


def absent_ones(wanted: Sequence[str]) -> Iterator[Finding]:
    """Say which paths and patterns name nothing: no reason for a job not to be saved."""
    for one in wanted:
        if one != AUTO and not _named(one):
            yield Finding(
                "weights-absent",
                Severity.NOTE,
                f"there is nothing at {one!r} for --weights",
                {"path": one},
                action="stores what the tree has in memory",
            )


def _named(path: str) -> list[str]:
    """The files and folders that a path or pattern names."""
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def chosen_files(
    wanted: Sequence[str], evidence: Evidence | None = None, *, may_be_absent: bool = False
) -> list[str]:
    """Return the files that `wanted` names (paths of files and folders, patterns, or "auto"), each once.

    Raises UsageError for a path or pattern that names nothing, unless it may.
    """
    found: list[str] = []
    for one in wanted:
        if one == AUTO and evidence is not None:
            found += _found_by_ourselves(evidence)
            continue
        named = _named(one)
        if not named and not may_be_absent:
            raise UsageError(
                f"there is nothing at {one}",
                hint="files of weights are named by path: files, folders and patterns",
            )
        for path in named:
            found += files_below(path) if os.path.isdir(path) else [path]
    unique: dict[tuple[int, int], str] = {}
    for path in map(os.path.abspath, found):
        try:
            status = os.stat(path)
        except OSError:
            continue
        if os.path.isfile(path) and status.st_size >= SMALLEST_BYTES:
            unique.setdefault((status.st_dev, status.st_ino), path)
    return list(unique.values())


def _found_by_ourselves(evidence: Evidence) -> Iterator[str]:
    """Files called as weights are that the tree has open or mapped, names, or finds through its environment.

    Of folders of models only files that are no larger than the tree are worth a look; how large that is when
    it uses GPUs is not known yet.
    """
    own = {file.path for file in (*evidence.in_memory_files, *evidence.written_files)}
    for path in _named_by(evidence):
        if path not in own:  # what the tree writes is its state, and what is in memory goes with the host
            yield path


def _named_by(evidence: Evidence) -> Iterator[str]:
    for file in evidence.named:
        if file.path.endswith(SUFFIXES):
            yield file.path
    folders: list[str] = []
    for process in evidence.tree.living:
        for word in process.argv:
            path = os.path.join(process.cwd, word.rpartition("=")[2])
            if path.endswith(SUFFIXES):
                yield path
            elif os.path.isdir(path) and len(word) > 1:
                folders.append(path)
        folders += _model_folders(process.pid)
    most = max(evidence.expected_bytes, _ON_GPUS if evidence.may_use_gpus else 0)
    for folder in dict.fromkeys(folders):
        for path in _likely_below(folder):
            try:
                if os.path.getsize(path) <= 4 * most:
                    yield path
            except OSError:
                continue


def _likely_below(folder: str) -> Iterator[str]:
    """Files called as weights are in a folder, not looking into more than some thousand entries."""
    return (path for path in files_below(folder, _MOST_ENTRIES) if path.endswith(SUFFIXES))


def _model_folders(pid: int) -> Iterator[str]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = dict(word.partition(b"=")[::2] for word in file.read().split(b"\0"))
    except OSError:
        return
    for name in _CACHES:
        if folder := os.fsdecode(words.get(name.encode(), b"")):
            yield folder
    home = os.fsdecode(words.get(b"HOME", b""))
    cache = os.fsdecode(words.get(b"XDG_CACHE_HOME", b"")) or f"{home}/.cache"
    for name in ("huggingface/hub", "torch/hub"):
        if os.path.isdir(f"{cache}/{name}"):
            yield f"{cache}/{name}"


class _Facts(NamedTuple):
    """What is remembered of a file's index: the BLAKE3 of the file (hexadecimal), and how many samples."""

    digest: str
    samples: int


class _OutOfTime(Exception):
    """An index is not to be finished, or read."""


class WeightsInUse:
    """The files that one dump compares with, opened and indexed. A context manager that closes them.

    What cannot be read, or not in time, is left out: its bytes are stored.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        """Open the files, the largest first, and no more than there may be."""
        self._left_out: list[str] = []
        self._late: list[str] = []
        self._indexed: list[_Facts] = []
        self.matcher: Matcher | None = None
        self.files: list[WeightsFile] = []
        for path in sorted(paths, key=_size_of, reverse=True):
            if len(self.files) == MOST_FILES:
                self._left_out.append(path)
                continue
            try:
                self.files.append(WeightsFile(path))
            except OSError:
                self._left_out.append(path)

    def index(
        self,
        amount: Callable[[int, int], None] = lambda done, total: None,
        until: float | None = None,
        only_kept: bool = False,
    ) -> None:
        """Index the files, or read the indexes that are kept; those of which that is not done by `until`
        (time.monotonic), and those without a kept one where `only_kept` count, are left out.

        `amount` is told how many bytes are done, of how many. Of many large files fewer samples are kept of
        each, so that all have room.
        """
        if not self.files:
            return  # most trees have none, and need nothing of what follows
        from crcli.memory.weights.cache import indexed, kept
        from crcli.memory.weights.match import Matcher
        from crcli.memory.weights.samples import Index

        before, total = 0, sum(file.size for file in self.files)

        def look() -> None:
            if until is not None and time.monotonic() > until:
                raise _OutOfTime

        def note(count: int) -> None:
            look()
            amount(before + count, total)

        indexes, bits = list[Index](), 0
        for file in list(self.files):
            try:
                look()
                found = kept(file, look) if only_kept else indexed(file, note)
            except _OutOfTime:
                found = None
            before += file.size
            if found is None:
                self._leave_out(file)
                continue
            self._indexed.append(_Facts(found.digest, len(found.samples.keys)))
            indexes.append(found.samples.thinned(bits))
            while sum(len(one.keys) for one in indexes) > MOST_SAMPLES:
                bits += 1
                indexes = [one.thinned(bits) for one in indexes]
        if self.files:
            self.matcher = Matcher(self.files, Index.joined(indexes))

    def _leave_out(self, file: WeightsFile) -> None:
        """Go on without a file that has no index."""
        self._late.append(file.path)
        self.files.remove(file)
        file.close()

    def findings(self) -> Iterator[Finding]:
        """What was left out, and why."""
        for paths, why, remedy in (
            (self._left_out, "cannot be read, or are too many", "name fewer files, the ones that matter"),
            (
                self._late,
                "were not indexed, or their index not read, in time",
                "`crcli weights index PATH` prepares them beforehand; name fewer files, the ones that matter",
            ),
        ):
            if paths:
                more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
                yield Finding(
                    "weights-left-out",
                    Severity.NOTE,
                    f"files of weights that {why} are not compared with: {paths[0]}{more}",
                    {"paths": paths[:_NAMED], "count": len(paths)},
                    action="stores what the tree has of them",
                    remedy=remedy,
                )

    def __enter__(self) -> WeightsInUse:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def facts(self) -> list[dict[str, Any]]:
        """Each file's path, size (bytes), BLAKE3, and how many samples its index has."""
        return [
            {"path": file.path, "bytes": file.size, "blake3": one.digest, "samples": one.samples}
            for file, one in zip(self.files, self._indexed, strict=True)
        ]

    def described(self) -> list[Weights]:
        """The files as a manifest lists them."""
        return [
            Weights(file.path, file.size, file.identity.mtime_ns, one.digest)
            for file, one in zip(self.files, self._indexed, strict=True)
        ]


def _size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _files_at(paths: Sequence[str]) -> list[str]:
    """The files that a command is about; raise UsageError where none is large enough to be one of weights."""
    if found := chosen_files(paths):
        return found
    raise UsageError(
        f"there is no file of {SMALLEST_BYTES >> 10} KiB or more at {', '.join(paths)}",
        hint="smaller files are not looked for in memory, and need no index and no copy in the store",
    )


def index_files(paths: Sequence[str], amount: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Index these files (see `_files_at`), those that have an index already left as they are.

    Raises HostLacks where no index can be kept.
    """
    from crcli.memory.weights.cache import see_that_it_keeps

    chosen = _files_at(paths)
    see_that_it_keeps()
    done: list[dict[str, Any]] = []
    for path in chosen:
        with WeightsInUse([path]) as in_use:
            in_use.index(amount)
            done += in_use.facts()
    return done


def files_known(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What is known of files here: their sizes, and the BLAKE3 of those that have an index (else empty)."""
    from crcli.memory.weights.cache import kept

    found: list[dict[str, Any]] = []
    for path in _files_at(paths):
        file = WeightsFile(path)
        try:
            known = kept(file)
            found.append({"path": path, "bytes": file.size, "blake3": known.digest if known else ""})
        finally:
            file.close()
    return found


def push_files(store: Store, paths: Sequence[str], amount: Callable[[int, int], None]) -> list[Pushed]:
    """Put these files (see `_files_at`) into a store. Raises what `push` does."""
    return [push(store, path, amount) for path in _files_at(paths)]


def image_weights(store: Store, ref: ImageRef) -> tuple[str, list[dict[str, Any]]]:
    """An image's full name, and what it has left out: see `weights_report`."""
    manifest = load(store, ref)
    return f"{manifest.name}@{manifest.id}", weights_report(manifest.weights, manifest.references)

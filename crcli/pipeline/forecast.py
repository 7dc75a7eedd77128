"""What a dump will take, said before it: how long the tree stands still, how much is stored, how long it is.

From a sample of the tree's memory (crcli.memory.sample) and this host's rates (crcli.pipeline.rates).
`predict` is arithmetic alone.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli.errors import NotFound, StoreError
from crcli.findings import Finding, Severity
from crcli.image.codec import compress
from crcli.image.index import PAGE_LIMIT, load_known
from crcli.image.packs import BLOB_BYTES
from crcli.memory.extents import PAGE
from crcli.memory.sample import Makeup, Sampler, Subject
from crcli.pipeline.facts import is_of
from crcli.pipeline.rates import Rates, learn, load_rates
from crcli.pipeline.stages import Forecast, Outcome
from crcli.pipeline.weights import WeightsInUse, chosen_files
from crcli.process.evidence import MEMORY_LIMIT, WRITTEN_LIMIT
from crcli.process.files import Kind, leased_inodes
from crcli.process.memory_room import spare_memory
from crcli.records import Struct
from crcli.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crcli.image.index import Expect, KnownChunks
    from crcli.memory.weights.match import Matcher
    from crcli.pipeline.rates import Amounts
    from crcli.pipeline.stages import DumpOptions, DumpReport
    from crcli.process.evidence import Evidence
    from crcli.process.files import FileId
    from crcli.store.base import Store

LOOK_S, LOOK_MOST_S = 0.1, 0.2
"""How long memory is sampled when nothing else is to be done: at least, and at most (seconds)."""

DUMP_LOOK_S, DUMP_LOOK_MOST_S = 0.015, 0.08
"""The same within a dump, where room for the pages is being made meanwhile, which takes longer."""

_LOOK_S_PER_GIB, _LOOK_S_PER_PROCESS = 0.1, 0.001

STORE_PATIENCE_S = 2.0
"""How long a forecast waits for a store that does not answer (seconds)."""

_MIB = 1 << 20
_ENOUGH = 4
"""A forecast reads the store's newest indexes until they hold so many times the tree's own pages."""

_IMAGE_BYTES, _PROCESS_BYTES, _THREAD_BYTES = 5500, 4500, 100
_REFERRED_BYTES, _NEW_BYTES = 150, 9 << 10
"""What an image costs beside its pages: at all, for each process and further thread, and for each MiB that it
refers to and that it adds to the store."""

_RATIO_OF_WEIGHTS = 0.8
"""How small numbers of 16 bits become, compressed: most of what is on GPUs."""

_MOST_BLOCKS, _FEWEST_BLOCKS = 24, 3
_LOOK_INTO_FILES = 64 << 10
"""Files that travel along are read when they hold more than this together (bytes)."""


class Load(Struct, frozen=True):
    """What a dump has to do. `threads` are those beyond the first of each process; files in bytes.

    `gpu_bytes` is memory of GPUs, which `memory` counts as well: as new, for nobody can look into it before.
    """

    processes: int
    threads: int
    memory: Makeup
    stored_bytes: int
    file_bytes: int = 0
    trial: bool = True
    reaped: bool = True
    gpu_bytes: int = 0
    stays: bool = True
    """Whether the tree stands still until its image is durable, and so is read where it is."""

    @property
    def taking(self) -> str:
        """The step in which CRIU sends the tree's pages."""
        return "take in place" if self.stays else "take"

    def amounts(self) -> Amounts:
        """The same as the rates count it."""
        memory = self.memory
        return {
            "once": 1,
            "processes": self.processes,
            "threads": self.threads,
            "mib": memory.total / _MIB,
            "zero": memory.zero / _MIB,
            "reused": (memory.reused + memory.weights) / _MIB,  # compared and hashed, too
            "new": memory.new / _MIB,
            "stored": self.stored_bytes / _MIB,
        }

    def gpu_amounts(self) -> Amounts:
        """What is moved from GPUs into the host's memory first."""
        return {"once": 1, "processes": self.processes, "mib": self.gpu_bytes / _MIB}

    def file_amounts(self) -> Amounts:
        """What the capture of files is given."""
        return {"once": 1, "mib": self.file_bytes / _MIB}


def image_bytes(processes: int, threads: int, memory: Makeup, file_stored: int) -> int:
    """What will go to the store for such a tree: memory, files, and the image's own tables.

    A process that has not run since the last dump has no new page, and what CRIU says of it is in the store.
    """
    ran = min(1.0, memory.new / PAGE / processes)
    tables = _IMAGE_BYTES + ran * (_PROCESS_BYTES * processes + _THREAD_BYTES * threads)
    tables += (_REFERRED_BYTES * memory.referred + _NEW_BYTES * memory.new) / _MIB
    return memory.stored + file_stored + round(tables)


def predict(load: Load, rates: Rates, store: str, room: int, spent_ms: float | None = None) -> Forecast:
    """The forecast for a load at a store.

    `room` is how much memory can wait outside of a tree that runs on until it was let go (bytes): for what
    does not fit, the tree waits for the store. `spent_ms` is what has passed since the command's start, when
    everything is ready for the freeze.
    """
    amounts = load.amounts()

    def takes(name: str, at: str = "") -> float:
        return rates.step(name, at).takes(amounts)

    total = load.memory.total
    spill = max(0.0, 1 - room / total) if total and not load.stays else 0.0
    ship = takes("ship", store)
    frozen = takes(load.taking) + rates.step("files").takes(load.file_amounts())
    frozen += rates.step("gpu").takes(load.gpu_amounts()) if load.gpu_bytes else 0.0
    frozen += ship * spill
    before = takes("look") + takes("prepare", store) if spent_ms is None else spent_ms
    after = (takes("trial") if load.trial else 0.0) + ship * (1 - spill)
    after += takes("reap") if load.reaped else 0.0
    return Forecast(round(frozen, 1), load.stored_bytes, round(before + frozen + after + takes("rest"), 1))


def look_ahead(
    evidence: Evidence, options: DumpOptions, name: str, gpu_bytes: int = 0
) -> tuple[Forecast | None, list[Finding]]:
    """The forecast for a dump that is not under way, made in about a tenth of a second and the store's own
    time; the tree and the store are not touched. `gpu_bytes` is the tree's memory on GPUs.

    None, with a finding that says why, when the store cannot be used.
    """
    store = open_store(options.store, endpoint_url=options.endpoint_url, patience_s=STORE_PATIENCE_S)
    try:
        room = store.room()
        pages = max(64 * _MIB, evidence.expected_bytes) * _ENOUGH // PAGE
        known = known_for(evidence, store, name, pages)
    except NotFound:
        known = None  # a directory store that the first dump will make
    except StoreError as error:
        return None, [_silent(options.store, error)]
    finally:
        store.close()
    with WeightsInUse(chosen_files(options.weights, evidence)) as weights:
        weights.index(only_kept=True)
        load = measure(evidence, options, known, LOOK_S, LOOK_MOST_S, weights.matcher, gpu_bytes)
        findings = list(weights.findings())
    if room is not None and room < load.stored_bytes:
        findings.append(_full(options.store, room, load.stored_bytes))
    return predict(load, load_rates(), options.store, spare_memory() // 2), findings


def known_for(
    evidence: Evidence,
    store: Store,
    name: str,
    limit: int = PAGE_LIMIT,
    gpu_bytes: int = 0,
    *,
    expect: Expect | None = None,
) -> KnownChunks:
    """What a dump of this tree under this name knows of what the store has; see load_known."""
    wanted = (evidence.expected_bytes + gpu_bytes) // PAGE
    return load_known(store, name, limit, wanted, lambda head: is_of(evidence, head), expect=expect)


def _silent(store: str, error: StoreError) -> Finding:
    return Finding(
        name="store-silent",
        severity=Severity.BLOCKER,
        message=f"the store {store} cannot be used: {error.message}",
        evidence={"store": store},
        action="gives no forecast; a dump to this store would fail with the tree running on",
        remedy=error.hint or "check the URL, credentials and network",
    )


def _full(store: str, room: int, stored_bytes: int) -> Finding:
    return Finding(
        name="store-full",
        severity=Severity.BLOCKER,
        message=f"the store {store} has room for {room >> 10} KiB; the image needs {stored_bytes >> 10} KiB",
        evidence={"store": store, "room": room, "stored_bytes": stored_bytes},
        action="would find it full: the dump would fail with the tree running on",
        remedy="free space there, run `crcli gc`, or choose another --store",
    )


def measure(
    evidence: Evidence,
    options: DumpOptions,
    known: KnownChunks | None,
    least_s: float,
    most_s: float,
    matcher: Matcher | None = None,
    gpu_bytes: int = 0,
) -> Load:
    """What a dump of this tree has to do, its memory sampled for about `least_s` to `most_s` seconds.

    With a `matcher` what stands in files of weights is left out, as the dump will. Memory of GPUs
    (`gpu_bytes`) cannot be looked into: all of it is taken to be new, and to be compressed as weights are.
    """
    began = time.monotonic()
    more_s = _LOOK_S_PER_GIB * evidence.expected_bytes / (1 << 30) + _LOOK_S_PER_PROCESS * len(evidence.tree)
    budget_s = min(most_s, least_s + more_s)
    subjects = [Subject(process.pid, process.anonymous_bytes) for process in evidence.tree.living]
    with Sampler(subjects, known, _ratio, budget_s, matcher) as sampler:
        memory = sampler.makeup()
        for path, size in _shared_objects(evidence):
            memory += sampler.shared_makeup(path, size)
    memory += Makeup(total=gpu_bytes, new=gpu_bytes, stored=round(gpu_bytes * _RATIO_OF_WEIGHTS))
    sizes = _carried(evidence, options.include)
    total = sum(sizes.values())
    stored = total
    if total > _LOOK_INTO_FILES:
        stored = round(total * _share_of_files(sizes, known, began + budget_s * 1.5))
    processes, threads = len(evidence.tree), max(0, evidence.threads - len(evidence.tree))
    return Load(
        processes=processes,
        threads=threads,
        memory=memory,
        stored_bytes=image_bytes(processes, threads, memory, stored),
        file_bytes=total,
        trial=options.trial,
        reaped=options.outcome == Outcome.KILLED,
        stays=options.outcome != Outcome.RUNNING,
        gpu_bytes=gpu_bytes,
    )


def _ratio(chunk: bytes) -> float:
    return len(compress(chunk)[1]) / len(chunk)


def _shared_objects(evidence: Evidence) -> Iterable[tuple[str, int]]:
    """The shared memory that no file system keeps, each once: how it is opened, and what it holds (bytes)."""
    found: dict[FileId, str] = {}
    for mapping in evidence.mappings:
        if mapping.is_anonymous_shared or mapping.is_memfd or mapping.is_sysv:
            found.setdefault(mapping.id, f"/proc/{mapping.pid}/map_files/{mapping.address}")
    for file in evidence.files:
        if file.kind is Kind.MEMFD:
            found.setdefault(file.id, f"/proc/{file.pid}/fd/{file.fd}")
    for path in found.values():
        try:
            size = os.stat(path).st_blocks * 512
        except OSError:
            continue
        if size:
            yield path, size


def _carried(evidence: Evidence, include: tuple[str, ...]) -> dict[str, int]:
    """The files that will travel along, by where they are seen from here, and their sizes: see capture.py."""
    root = f"/proc/{evidence.root.pid}/root"
    in_memory = {file.path for file in evidence.in_memory_files}
    found: dict[str, int] = {}
    for file in evidence.named:
        limit = MEMORY_LIMIT if file.path in in_memory else WRITTEN_LIMIT if file.written else 0
        if 0 < file.size <= limit:
            found[root + file.path] = file.size
    for gone in evidence.deleted:
        if gone.open and gone.size:
            found[f"/proc/{gone.open[0].pid}/fd/{gone.open[0].fd}"] = gone.size
    siblings = [root + path for database in evidence.databases for path in database.siblings]
    for path in (*siblings, *_included(root, include)):
        try:
            found[path] = os.stat(path).st_size
        except OSError:
            continue
    return found


def _included(root: str, include: tuple[str, ...]) -> Iterable[str]:
    for path in include:
        top = root + os.path.abspath(path)
        yield from (f"{folder}/{name}" for folder, _, names in os.walk(top) for name in names)
        if os.path.isfile(top):
            yield top


def _share_of_files(sizes: Mapping[str, int], known: KnownChunks | None, until: float) -> float:
    """How much of these files' bytes is left when what the store has is left out, and the rest compressed.

    A few blocks are read. A file that somebody holds a lease on is not opened, which would break the lease.
    """
    leased = leased_inodes()
    blocks = [(path, at) for path, size in sizes.items() for at in range(0, size, BLOB_BYTES)]
    raw = stored = 0.0
    for count, (path, at) in enumerate(
        random.Random(len(blocks)).sample(blocks, min(_MOST_BLOCKS, len(blocks)))
    ):
        if count >= _FEWEST_BLOCKS and time.monotonic() > until:
            break
        try:
            block = _read_block(path, at, leased)
        except OSError:
            continue
        if block:
            raw += len(block)
            if known is None or known.find_blob(blake3(block).digest()) is None:
                stored += len(block) * _ratio(block)
    return stored / raw if raw else 1.0


def _read_block(path: str, at: int, leased: frozenset[int]) -> bytes:
    if os.stat(path).st_ino in leased:
        return b""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(fd, BLOB_BYTES, at)
    finally:
        os.close(fd)


def learn_from(report: DumpReport, load: Load, fits: bool) -> None:
    """Keep what a dump has shown, for the forecasts to come. `load` is what it turned out to do.

    `fits`: all of the tree's pages found room outside of it, and nothing was cut short by a deadline.
    """
    phases, amounts, store = report.phases, load.amounts(), report.store
    own = {"files": load.file_amounts(), "gpu": load.gpu_amounts()}
    times = {
        ("look", ""): phases.get("look", 0.0),
        ("files", ""): phases.get("files", 0.0),
        ("trial", ""): phases.get("trial", 0.0),
        ("reap", ""): phases.get("reap", 0.0),
        ("gpu", ""): phases.get("gpu lock", 0.0) + phases.get("gpu checkpoint", 0.0),
        ("rest", ""): report.total_ms - sum(phases.values()),
    }
    if fits:
        times[("prepare", store)] = phases.get("prepare", 0.0)
        times[(load.taking, "")] = phases.get("take", 0.0)
        times[("ship", store)] = phases.get("store", 0.0) + phases.get("hold", 0.0)
    learn({step: (own.get(step[0], amounts), took) for step, took in times.items() if took > 0})

"""Images and stores, for people and for programs."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from crcli.image.weights import weights_report
from crcli.memory.extents import PAGE, Source
from crcli.ui.reports import phases, show_json
from crcli.ui.table import show_table
from crcli.ui.text import count, duration, printable, size
from crcli.ui.weights import weights_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crcli.image.catalog import Entry
    from crcli.image.claims import Claim
    from crcli.image.copy import CopyReport
    from crcli.image.gc import GcReport
    from crcli.image.manifest import Manifest
    from crcli.image.verify import VerifyReport


def show_entries(
    entries: Sequence[Entry], claims: Mapping[str, Claim], store_url: str, as_json: bool, name: str = ""
) -> None:
    """Show what a store holds, of this name or in all, and who holds the names of it."""
    if as_json:
        images = [entry.as_json() | {"claim": _claim(claims.get(entry.ref.name))} for entry in entries]
        show_json({"store": store_url, "images": images})
    elif not entries:
        print(
            printable(f"no images of the name {name} in {store_url}" if name else f"no images in {store_url}")
        )
    else:
        columns = ("IMAGE", "CREATED", "PROCESSES", "MEMORY", "HOST", "COMMAND")
        show_table(columns, [_entry_row(entry) for entry in entries], right=("PROCESSES", "MEMORY"))
        for name in dict.fromkeys(entry.ref.name for entry in entries if entry.ref.name in claims):
            print(printable(f"{name} is claimed by {claims[name].holder} since {when(claims[name].since)}"))


def _claim(claim: Claim | None) -> dict[str, Any] | None:
    return claim.as_json() if claim is not None else None


def _entry_row(entry: Entry) -> list[str]:
    if entry.damage:
        return [str(entry.ref), when(entry.created), "", "", "", f"damaged: {entry.damage}"]
    command = entry.command if len(entry.command) <= 60 else entry.command[:57] + "..."
    row = [str(entry.ref), when(entry.created), str(entry.processes), size(entry.memory_bytes)]
    return [*row, entry.host, command]


def describe_image(manifest: Manifest, store_url: str) -> dict[str, Any]:
    """One image as `crcli show --json` prints it; sizes in bytes."""
    extents = [extent for space in manifest.spaces.values() for extent in space]
    by_source = {source: sum(e.pages for e in extents if e.source == source) * PAGE for source in Source}
    return {
        "image": f"{manifest.name}@{manifest.id}",
        "name": manifest.name,
        "id": manifest.id,
        "store": store_url,
        "memory_bytes": sum(by_source.values()),
        "zero_bytes": by_source[Source.ZERO],
        "stored_bytes": sum(chunk.stored for chunk in manifest.chunks),
        "weights_bytes": by_source[Source.WEIGHTS],
        "weights": weights_report(manifest.weights, manifest.references),
        "packs": len(manifest.packs),
        "chunks": len(manifest.chunks),
        "files": [
            {"path": file.name, "bytes": file.size, "role": file.role, "mode": file.mode, "uid": file.uid}
            for file in manifest.files
        ],
        **{key: value for key, value in manifest.meta.items() if key != "plan"},
    }


def show_image(manifest: Manifest, claim: Claim | None, store_url: str, as_json: bool) -> None:
    """Show what an image holds, where it came from, and who holds its name."""
    facts = describe_image(manifest, store_url) | {"claim": _claim(claim)}
    if as_json:
        show_json(facts)
        return
    host = facts.get("host", {})
    memory = f"{size(facts['memory_bytes'])}, of which {size(facts['zero_bytes'])} zeros"
    stored = f"{size(facts['stored_bytes'])} in {count(facts['packs'], 'pack')}"
    lines = {
        "image": facts["image"],
        "store": store_url,
        "created": when(facts.get("created", 0.0)),
        "host": f"{host.get('hostname', '?')}, {host.get('machine', '?')}, Linux {host.get('kernel', '?')}",
        "memory": memory,
        "stored": stored,
        "frozen": duration(facts.get("frozen_ms", 0.0)),
        "phases": phases(facts.get("phases", {})),
    }
    gpu = facts.get("gpu") or {}
    if gpu:
        lines["gpus"] = _gpus(gpu)
    if claim is not None:
        lines["claimed"] = f"by {claim.holder} since {when(claim.since)}"
    for name, value in lines.items():
        print(printable(f"{name:<8} {value}"))
    print()
    show_table(("PID", "USER", "THREADS", "COMMAND"), [_process_row(one) for one in facts.get("tree", ())])
    if gpu:
        print()
        show_table(("PID", "GPU", "UUID", "MEMORY"), _gpu_rows(gpu), right=("MEMORY",))
    if facts["weights"]:
        print()
        columns = ("WEIGHTS", "SIZE", "LEFT OUT", "NOT IN MEMORY")
        show_table(columns, weights_rows(facts["weights"]), right=columns[1:])
    if facts["files"]:
        print()
        rows = [(file["path"], size(file["bytes"]), file["role"]) for file in facts["files"]]
        show_table(("FILE", "SIZE", "WHY"), rows, right=("SIZE",))


def _gpus(gpu: dict[str, Any]) -> str:
    """The GPUs of the host of the dump, and their driver."""
    host = gpu.get("host", {})
    kinds = Counter(str(one.get("name", "?")) for one in host.get("gpus", ()))
    names = ", ".join(f"{number} × {name}" if number > 1 else name for name, number in kinds.items())
    return f"{names or 'unknown'}, driver {host.get('driver') or '?'}"


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each process and GPU: how much memory it has there."""
    names = {one.get("uuid"): str(one.get("name", "?")) for one in gpu.get("host", {}).get("gpus", ())}
    return [
        (str(process.get("pid", "")), names.get(uuid, "?"), str(uuid), size(used) if used else "unknown")
        for process in gpu.get("processes", ())
        for uuid, used in (process.get("used") or {"": 0}).items()
    ]


def _process_row(process: dict[str, Any]) -> list[str]:
    command = " ".join(process.get("argv", ())) or str(process.get("comm", ""))
    return [
        str(process.get("pid", "")),
        str(process.get("uid", "")),
        str(process.get("threads", "")),
        command,
    ]


def show_verified(report: VerifyReport, as_json: bool) -> None:
    """Show that an image is whole."""
    if as_json:
        show_json(report.as_json())
        return
    read = f"{count(report.chunks, 'chunk')} in {count(report.packs, 'pack')}, {size(report.stored_bytes)}"
    print(printable(f"{report.image} is whole: {read}, read in {duration(report.total_ms)}"))
    if report.weights_bytes:
        print(f"{size(report.weights_bytes)} of its memory were compared with files of weights")
    for path in report.weights_missing:
        print(printable(f"{path}, from which weights are to be read, is neither here nor in the store"))


def show_copied(report: CopyReport, as_json: bool) -> None:
    """Show what a copy did."""
    if as_json:
        show_json(report.as_json())
    elif report.was_there:
        print(printable(f"{report.image} was in {report.target} already"))
    else:
        packs = f"{report.packs_copied} of {count(report.packs, 'pack')}, {size(report.copied_bytes)}"
        print(printable(f"{report.image} is in {report.target}: {packs}, in {duration(report.total_ms)}"))


def show_collected(report: GcReport, as_json: bool) -> None:
    """Show what a collection freed."""
    if as_json:
        show_json(report.as_json())
        return
    done = "would be removed" if report.dry_run else "removed"
    print(
        f"{count(report.packs_removed, 'pack')} ({size(report.bytes_removed)}) {done}; "
        f"{report.packs_kept} ({size(report.bytes_kept)}) left, of {count(report.images, 'image')}"
    )
    if report.sessions_removed or report.leftovers_removed:
        leftovers = report.sessions_removed + report.leftovers_removed
        print(f"{count(leftovers, 'leftover')} of killed commands removed")
    if report.deferred:
        print(
            printable(f"packs stay for this time, because of work in progress: {', '.join(report.deferred)}")
        )
    for line in report.notes:
        print(printable(line))


def when(created: float) -> str:
    """A time as people here read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created)) if created else "?"

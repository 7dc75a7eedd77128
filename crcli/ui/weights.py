"""Files of weights, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.records import asdict
from crcli.ui.reports import show_json
from crcli.ui.table import show_table
from crcli.ui.text import count, printable, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.image.weights import Pushed


def show_indexed(files: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Show which files have an index now."""
    if as_json:
        show_json({"files": list(files)})
        return
    for file in files:
        print(printable(f"{file['path']}: {size(file['bytes'])}, {count(file['samples'], 'sample')}"))


def show_pushed(files: Sequence[Pushed], store_url: str, as_json: bool) -> None:
    """Show what was put into a store."""
    if as_json:
        show_json({"store": store_url, "files": [asdict(file) for file in files]})
        return
    for file in files:
        what = "was there already" if file.was_there else f"{size(file.stored_bytes)} sent"
        print(printable(f"{file.path}: {size(file.size)}, {what}"))


def show_in_store(files: Sequence[dict[str, Any]], store_url: str, as_json: bool) -> None:
    """Show the files that a store holds."""
    if as_json:
        show_json({"store": store_url, "files": list(files)})
    elif not files:
        print(printable(f"no files of weights in {store_url}"))
    else:
        rows = [(file["name"] or "damaged", size(file["bytes"]), file["blake3"]) for file in files]
        show_table(("FILE", "SIZE", "BLAKE3"), rows, right=("SIZE",))


def show_removed(file: dict[str, Any], store_url: str, as_json: bool) -> None:
    """Show which file was removed from a store."""
    if as_json:
        show_json({"store": store_url, "removed": file})
    else:
        name = file["name"] or file["blake3"]
        print(printable(f"removed {name} ({size(file['bytes'])}); `crcli gc` frees its space"))


def show_files(files: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Show files here, and whether each has an index."""
    if as_json:
        show_json({"files": list(files)})
        return
    rows = [(file["path"], size(file["bytes"]), file["blake3"] or "not indexed") for file in files]
    show_table(("FILE", "SIZE", "BLAKE3"), rows, right=("SIZE",))


def show_left_out(image: str, files: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Show what an image has left out, file by file, and what of each was not in memory."""
    if as_json:
        show_json({"image": image, "files": list(files)})
    elif not files:
        print(printable(f"{image} refers to no file of weights"))
    else:
        columns = ("FILE", "SIZE", "LEFT OUT", "NOT IN MEMORY")
        show_table(columns, weights_rows(files), right=columns[1:])


def weights_rows(files: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A table's rows for what `pipeline.weights.weights_report` says."""
    return [
        (
            file["path"],
            size(file["bytes"]),
            size(file["left_out_bytes"]),
            size(file["bytes"] - file["found_bytes"]),
        )
        for file in files
    ]

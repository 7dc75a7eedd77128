"""What this host keeps of remote stores, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.ui.reports import show_json
from crcli.ui.table import show_table
from crcli.ui.text import count, printable, size

if TYPE_CHECKING:
    from crcli.image.cached import CacheReport
    from crcli.store.cache import Contents


def show_cache(report: CacheReport, as_json: bool) -> None:
    """Show what a cache holds."""
    if as_json:
        show_json(report.as_json())
        return
    if report.trouble:
        print(printable(f"{report.folder} cannot be used: {report.trouble}"))
        return
    if report.images:
        rows = [
            (one.image, size(one.memory_bytes), "yes" if one.whole else "in part", one.store)
            for one in report.images
        ]
        show_table(("IMAGE", "MEMORY", "HERE", "STORE"), rows, right=("MEMORY",))
    bound = f"of at most {size(report.limit_bytes)}" if report.limit_bytes else "and nothing is to be kept"
    print(printable(f"{report.folder}: {count(report.packs, 'pack')}, {size(report.bytes)} {bound}"))


def show_cleared(folder: str, removed: Contents, as_json: bool) -> None:
    """Show what was removed from a cache."""
    if as_json:
        show_json({"folder": folder, "files": len(removed.files), "bytes": removed.bytes})
    else:
        print(printable(f"removed {count(len(removed.files), 'file')}, {size(removed.bytes)}, from {folder}"))

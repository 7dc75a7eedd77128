"""What is known so far, on disk at any moment: results.json, and in failures.txt the evidence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

RESULTS, FAILURES = "results.json", "failures.txt"
_MOST_EVIDENCE = 200_000
_MOST_FAILURES = 12 << 20


class Record:
    """The results of one run. Each `note` is on disk when it returns: a kill loses nothing that was noted."""

    def __init__(self, folder: Path, began: float, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._began = began
        self.data: dict[str, Any] = {"format": 1, **header, "probe": {}, "scenarios": {}, "stopped": ""}
        self.save()

    def note(self, part: str, name: str, found: Any) -> None:
        """Keep one thing found, in `probe` or `scenarios`; its evidence goes to the file of failures."""
        if isinstance(found, dict) and (evidence := found.pop("evidence", "") if part == "scenarios" else ""):
            self._keep(name, f"{found.get('why', '')}\n{evidence}")
        self.data[part][name] = found
        self.save()

    def stopped(self, why: str) -> None:
        """Say why the run went no further."""
        self.data["stopped"] = why
        self.save()

    def set(self, **found: Any) -> None:
        """Keep something about the whole run."""
        self.data |= found
        self.save()

    def save(self) -> None:
        """results.json is whole, and holds all of it."""
        self.data["seconds"] = round(time.time() - self._began, 1)
        partial = self._folder / f"{RESULTS}.partial"
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self._folder / RESULTS)

    def _keep(self, name: str, text: str) -> None:
        with (self._folder / FAILURES).open("a") as file:
            if file.tell() < _MOST_FAILURES:
                file.write(f"=== {name}\n{text[-_MOST_EVIDENCE:]}\n\n")

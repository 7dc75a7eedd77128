"""How findings are worded: who holds what, in a sentence for people and as JSON for programs.

One finding stands for everything of its kind: its message names the first process and how many more there
are, its evidence lists them all. Only what leads to different places outside gets a finding each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from crcli.findings import Finding, Severity
from crcli.process.evidence import Evidence, HeldSocket, NamedFile
from crcli.process.files import Mapping, OpenFile
from crcli.process.outside import Outsider
from crcli.process.tree import Process

Check = Callable[[Evidence], Iterator[Finding]]
"""One family of findings."""

Held = OpenFile | Mapping
"""Something that a process of the tree has: an open descriptor, or a mapping."""


def blocker(name: str, message: str, evidence: dict[str, Any], remedy: str) -> Finding:
    """Return a finding with which a dump must not begin."""
    return Finding(name, Severity.BLOCKER, message, evidence, "refuses, before anything is touched", remedy)


# --- sentences ---------------------------------------------------------------------------------------------


def who(evidence: Evidence, held: Sequence[Held]) -> str:
    """Return the first holder, and how many more there are: `node (4711) fd 21 (and 2 more)`."""
    first = held[0]
    descriptor = f" fd {first.fd}" if isinstance(first, OpenFile) else ""
    return f"{evidence.label(first.pid)}{descriptor}{and_more(held)}"


def first_of(processes: Sequence[Process]) -> str:
    """Return the first process, and how many more there are: `node (4711) (and 2 more)`."""
    return f"{processes[0].label}{and_more(processes)}"


def how_to_continue(stopped: Sequence[Process]) -> str:
    """Return the command for all of them: each process is stopped by itself."""
    pids = " ".join(str(process.pid) for process in stopped)
    return f"`kill -CONT {pids}` continues {'it' if len(stopped) == 1 else 'them'}"


def and_more(held: Sequence[object]) -> str:
    """Return how many there are beside the first, empty for none."""
    return f" (and {len(held) - 1} more)" if len(held) > 1 else ""


def count(held: Sequence[object], noun: str) -> str:
    """Return `1 file`, `2 files`."""
    return f"{len(held)} {noun}" if len(held) == 1 else f"{len(held)} {noun}s"


# --- JSON --------------------------------------------------------------------------------------------------


def places(evidence: Evidence, held: Iterable[Held]) -> dict[str, Any]:
    """Return every holder, under `where`."""
    return {"where": [place(evidence, one) for one in held]}


def place(evidence: Evidence, one: Held) -> dict[str, Any]:
    """Return which process has it, as which descriptor or at which address, and its path."""
    spot = {"fd": one.fd} if isinstance(one, OpenFile) else {"address": one.address}
    return {"pid": one.pid, "command": evidence.tree.process(one.pid).comm, **spot, "path": one.path}


def process_list(processes: Iterable[Process], *attributes: str) -> dict[str, Any]:
    """Return the processes, each with the named attributes, under `processes`."""
    return {
        "processes": [
            {"pid": one.pid, "command": one.comm} | {name: getattr(one, name) for name in attributes}
            for one in processes
        ]
    }


def connections(evidence: Evidence, held: Iterable[HeldSocket]) -> dict[str, Any]:
    """Return both ends and the state of each connection, under `connections`."""
    return {
        "connections": [
            place(evidence, one.holders[0])
            | {
                "local": str(one.socket.local),
                "remote": str(one.socket.remote),
                "state": one.socket.state.value,
            }
            for one in held
        ]
    }


def outsider_list(outsiders: Iterable[Outsider]) -> list[dict[str, Any]]:
    """Return processes outside the tree, each with the descriptor through which it holds something of it."""
    return [{"pid": one.pid, "command": one.comm, "fd": one.fd} for one in outsiders]


def file_list(files: Iterable[NamedFile]) -> dict[str, Any]:
    """Return paths and sizes under `files`."""
    return {"files": [{"path": one.path, "bytes": one.size} for one in files]}

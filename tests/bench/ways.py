"""The ways to move a process that are compared. Each begins with a subject of its own and measures itself."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from crcli.criu.binary import criu_command
from tests.bench import limits
from tests.bench.cold import forget
from tests.bench.commands import BenchError, Ran, Subject, run
from tests.bench.container import Container
from tests.support.crcli import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.s3servers import S3Server

Figures: TypeAlias = dict[str, float]
"""One round of one way: the figure's name (see table.py) -> its value."""


@dataclass(frozen=True)
class Place:
    """Where a round happens: its kind of subject and how large, a folder of its own, and the object store."""

    kind: str
    mebibytes: int
    folder: Path
    server: S3Server

    def subject(self) -> Subject:
        """A subject that is not running yet."""
        return Subject(self.mebibytes, self.folder / "subject", kind=self.kind)


def bare(place: Place) -> Figures:
    """The limits (see limits.py)."""
    with place.subject() as subject:
        return limits.of(subject, place.folder, place.server)


@dataclass(frozen=True)
class ToFolder:
    """A tool that dumps into a folder of CRIU's images: with a warm page cache, and restored warm and cold.

    `tool` makes what dumps and restores (see Criu) for a round.
    """

    tool: Callable[[Place], Tool]

    def __call__(self, place: Place) -> Figures:
        """Take all figures of one round."""
        images = place.folder / "images"
        tool = self.tool(place)
        with tool.subject as subject:
            living = _dumped(tool, images, leave_running=True)
            figures = {"pause_ms": subject.ask()["still_ms"], "frozen_running_ms": _frozen_ms(images)}
            shutil.rmtree(images)  # the memory that held these files is free now, and will hold the next
            began = time.monotonic()
            done = _dumped(tool, images)
            _sync_files(images)
            figures |= {
                "frozen_ms": _frozen_ms(images),
                "dump_s": time.monotonic() - began,
                "dump_cpu_s": done.cpu_s,
                "dump_peak_mib": max(living.peak_mib, done.peak_mib),
                "stored_mib": _size_mib(images),
            }
            subject.died()
            warm = tool.restore(images)
            figures |= _restored("warm", warm, subject) | {"restore_cpu_s": warm.cpu_s}
            tool.clear()
            forget(images)
            cold = tool.restore(images)
            figures |= _restored("cold", cold, subject)
            figures["restore_peak_mib"] = max(warm.peak_mib, cold.peak_mib)
        return figures


class Tool:
    """What dumps a subject into a folder and restores it from there: CRIU's own command."""

    def __init__(self, place: Place) -> None:
        self.subject = place.subject()

    def dump(self, images: Path, *, leave_running: bool) -> Ran:
        """Dump it into this folder, which is empty."""
        command = [*criu_command(), "dump", "-t", str(self.subject.pid), "-D", str(images), "-o", "dump.log"]
        return run([*command, *["--leave-running"] * leave_running], self.subject.limit_s)

    def restore(self, images: Path) -> Ran:
        """Restore it from this folder."""
        command = [*criu_command(), "restore", "-d", "-D", str(images), "-o", "restore.log"]
        done = run(command, self.subject.limit_s)
        self.subject.came_back(self.subject.pid)
        return done

    def clear(self) -> None:
        """End what was restored."""
        self.subject.end()


class Runc(Tool):
    """runc's checkpoint and restore of a container with the subject in it."""

    subject: Container

    def __init__(self, place: Place) -> None:
        self.subject = Container(place.mebibytes, place.folder / "subject", kind=place.kind)

    def dump(self, images: Path, *, leave_running: bool) -> Ran:
        """Checkpoint the container."""
        return self.subject.checkpoint(images, *["--leave-running"] * leave_running)

    def restore(self, images: Path) -> Ran:
        """Restore the container."""
        return self.subject.restore(images)


def script(place: Place) -> Figures:
    """`criu dump`, `tar | zstd -1`, upload with boto3; and back."""
    images, archive, key = place.folder / "images", place.folder / "archive.tar.zst", "script/archive.tar.zst"
    tool = Tool(place)
    with tool.subject as subject:
        began = time.monotonic()
        done = _dumped(tool, images)
        subject.died()
        packed = _shell(f"tar -C {images} -c . | zstd -q -1 -o {archive}", subject)
        sent = limits.client("up", archive, key, place.server, subject.limit_s)
        figures = {
            "frozen_ms": _frozen_ms(images),
            "dump_s": time.monotonic() - began,
            "dump_cpu_s": done.cpu_s + packed.cpu_s + sent.cpu_s,
            "dump_peak_mib": max(done.peak_mib, packed.peak_mib, sent.peak_mib),
            "stored_mib": archive.stat().st_size / 2**20,
        }
        shutil.rmtree(images)
        archive.unlink()
        fetched = limits.client("down", archive, key, place.server, subject.limit_s)
        images.mkdir()
        unpacked = _shell(f"zstd -q -d -c {archive} | tar -C {images} -x", subject)
        restored = tool.restore(images)
        figures |= _restored("cold", restored, subject, began=fetched.began)
        figures["restore_cpu_s"] = fetched.cpu_s + unpacked.cpu_s + restored.cpu_s
        figures["restore_peak_mib"] = max(fetched.peak_mib, unpacked.peak_mib, restored.peak_mib)
    return figures


@dataclass(frozen=True)
class Crcli:
    """crcli with a store of one kind: dumped living, dumped and killed, restored, changed, dumped again.

    Restored three times: from where the bytes lie nearest (`warm`: the page cache of a folder, and the local
    cache where this crcli has one), with `--lazy` (where it has that) and eagerly from a cold store. A cold
    folder is out of the page cache, and what is cold finds an empty local cache.
    """

    url: Callable[[Place, str], str]
    env: Callable[[Place], dict[str, str]] = field(default=lambda _: {})
    is_folder: bool = False

    def __call__(self, place: Place) -> Figures:
        """Take all figures of one round."""
        with place.subject() as subject:
            living = self._dump(place, subject, "living", "--leave-running")
            figures = {
                "pause_ms": subject.ask()["still_ms"],
                "frozen_running_ms": living.json["frozen_ms"],
                "dump_running_s": living.wall_s,
            }
            first = self._dump(place, subject, "killed")
            subject.died()
            figures |= {
                "frozen_ms": first.json["frozen_ms"],
                "dump_s": first.wall_s,
                "dump_cpu_s": first.cpu_s,
                "stored_mib": first.json["stored_bytes"] / 2**20,
            }
            if self.is_folder or knows("cache"):
                figures |= self._restored(place, subject, "warm")
                subject.end()
            if knows("restore", "--lazy"):
                self._cool(place)
                figures |= self._restored(place, subject, "lazy", "--lazy")
                subject.end()
            self._cool(place)
            figures |= self._restored(place, subject, "cold")
            subject.change()
            second = self._dump(place, subject, "killed")
            subject.died()
            figures |= {
                "second_s": second.wall_s,
                "second_mib": second.json["stored_bytes"] / 2**20,
                "second_frozen_ms": second.json["frozen_ms"],
                "dump_peak_mib": max(ran.peak_mib for ran in (living, first, second)),
                "dump_held_mib": max(ran.held_mib for ran in (living, first, second)),
            }
            self._restored(place, subject, "cold")  # the second image is compared too
        return figures

    def _dump(self, place: Place, subject: Subject, store: str, *options: str) -> Ran:
        return self._run(
            place, subject, store, "warm", "dump", str(subject.pid), "--name", "subject", *options
        )

    def _restored(self, place: Place, subject: Subject, how: str, *options: str) -> Figures:
        """Restore the newest image, compare its memory, and say how long that took."""
        cache = "warm" if how == "warm" else "cold"
        done = self._run(place, subject, "killed", cache, "restore", "subject", *options)
        subject.came_back(done.json["host_pid"])
        figures = _restored(how, done, subject) | {f"{how}_ready_ms": done.json["ready_ms"]}
        if how == "cold":
            figures |= {"restore_cpu_s": done.cpu_s, "restore_peak_mib": done.peak_mib}
        return figures

    def _cool(self, place: Place) -> None:
        """Have the next restore find neither the store's files in the page cache nor anything in its own."""
        shutil.rmtree(place.folder / "cold", ignore_errors=True)
        if self.is_folder:
            forget(place.folder / "killed")

    def _run(self, place: Place, subject: Subject, store: str, cache: str, *arguments: str) -> Ran:
        command = [sys.executable, "-m", "crcli", *arguments, "--store", self.url(place, store), "--json"]
        env = {
            "CRCLI_LOG_DIR": str(place.folder / "logs"),
            "CRCLI_RATES": str(place.folder / "rates.json"),
            "CRCLI_STATE_DIR": str(place.folder / "state"),
            "CRCLI_CACHE_DIR": str(place.folder / cache),
        }
        os.sync()
        return run(command, subject.limit_s, env | self.env(place))


@cache
def knows(command: str, option: str = "") -> bool:
    """Whether this crcli has the command, and the option."""
    done = subprocess.run(
        [sys.executable, "-m", "crcli", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0 and option in done.stdout


WAYS: dict[str, Callable[[Place], Figures]] = {
    "limits": bare,
    "criu": ToFolder(Tool),
    "runc": ToFolder(Runc),
    "script": script,
    "crcli file": Crcli(lambda place, store: f"file://{place.folder}/{store}", is_folder=True),
    "crcli s3": Crcli(
        lambda place, store: place.server.url(f"crcli/{store}"), lambda place: place.server.env
    ),
}


def clean_up(place: Place) -> None:
    """Remove what a round left in its folder and in the object store."""
    with open("/proc/self/mountinfo") as file:
        if any(f" {place.folder}/" in line for line in file):
            raise BenchError(f"something is mounted below {place.folder}: it is left as it is")
    shutil.rmtree(place.folder, ignore_errors=True)
    if place.server.process.poll() is not None:  # a signal to all of us has ended it too
        return
    client, bucket = place.server.client(), place.server.bucket
    while objects := client.list_objects_v2(Bucket=bucket).get("Contents"):
        client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": found["Key"]} for found in objects]})


def _dumped(tool: Tool, images: Path, *, leave_running: bool = False) -> Ran:
    images.mkdir()
    os.sync()
    return tool.dump(images, leave_running=leave_running)


def _restored(how: str, ran: Ran, subject: Subject, began: float | None = None) -> Figures:
    """When a restored subject ran and was whole, by its own clock, since `began`; its memory is as it was."""
    began = ran.began if began is None else began
    report = subject.ask()
    return {
        f"{how}_first_s": report["ran_again_at"] - began,
        f"{how}_whole_s": report["whole_at"] - began,
        f"{how}_end_s": ran.began + ran.wall_s - began,
    }


def _frozen_ms(images: Path) -> float:
    """CRIU's own word for how long the tree stood frozen."""
    from pycriu.images.stats_pb2 import stats_entry

    data = (images / "stats-dump").read_bytes()
    (size,) = struct.unpack_from("<I", data, 8)
    return float(stats_entry.FromString(data[12 : 12 + size]).dump.frozen_time) / 1000


def _shell(line: str, subject: Subject) -> Ran:
    return run(["bash", "-c", f"set -o pipefail; {line}"], subject.limit_s)


def _sync_files(folder: Path) -> None:
    """Make a folder's files durable, as a store of crcli's is when a dump returns."""
    subprocess.run(["sync", *(str(path) for path in folder.iterdir() if path.is_file())], check=True)


def _size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


__all__ = ["WAYS", "BenchError", "Figures", "Place", "clean_up"]

"""The ways to move a process that are compared. Each begins with a subject of its own and measures itself."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from crcli.criu.binary import criu_command
from tests.bench.commands import BenchError, Ran, Subject, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.s3servers import S3Server

Figures: TypeAlias = dict[str, float]
"""One round of one way: the figure's name (see table.py) -> its value."""


@dataclass(frozen=True)
class Place:
    """Where a round happens: how large its subject is, a folder of its own, and the object store."""

    mebibytes: int
    folder: Path
    server: S3Server

    def subject(self, name: str) -> Subject:
        """A subject that is not running yet."""
        return Subject(self.mebibytes, self.folder / name)


def raw(place: Place) -> Figures:
    """`criu dump` and `criu restore`, to and from a folder."""
    images = place.folder / "images"
    with place.subject("subject") as subject:
        living = _criu_dump(subject, images, "--leave-running")
        figures = {"pause_ms": subject.ask()["still_ms"]}
        shutil.rmtree(images)
        done = _criu_dump(subject, images)
        subject.died()
        began = time.monotonic()
        _sync_files(images)
        figures |= {
            "frozen_running_ms": _frozen_ms(living[1]),
            "frozen_ms": _frozen_ms(done[1]),
            "dump_s": done[0].wall_s + time.monotonic() - began,
            "dump_cpu_s": done[0].cpu_s,
            "stored_mib": _size_mib(images),
        }
        restored = _criu_restore(subject, images)
        figures |= {
            "ready_ms": restored.wall_s * 1000,
            "restore_s": restored.wall_s,
            "restore_cpu_s": restored.cpu_s,
            "ran_again_s": subject.ask()["ran_again_at"] - restored.began,
        }
    return figures


def script(place: Place) -> Figures:
    """`criu dump`, `tar | zstd -1`, upload with boto3; and back."""
    images, archive, key = place.folder / "images", place.folder / "archive.tar.zst", "script/archive.tar.zst"
    with place.subject("subject") as subject:
        began = time.monotonic()
        done, _ = _criu_dump(subject, images)
        subject.died()
        packed = _shell(f"tar -C {images} -c . | zstd -q -1 -o {archive}", subject)
        sent = _client("up", archive, key, place, subject)
        figures = {
            "dump_s": time.monotonic() - began,
            "dump_cpu_s": done.cpu_s + packed.cpu_s + sent.cpu_s,
            "stored_mib": archive.stat().st_size / 2**20,
        }
        shutil.rmtree(images)
        archive.unlink()
        fetched = _client("down", archive, key, place, subject)
        images.mkdir()
        unpacked = _shell(f"zstd -q -d -c {archive} | tar -C {images} -x", subject)
        restored = _criu_restore(subject, images)
        figures |= {
            "restore_s": restored.began + restored.wall_s - fetched.began,
            "restore_cpu_s": fetched.cpu_s + unpacked.cpu_s + restored.cpu_s,
            "ran_again_s": subject.ask()["ran_again_at"] - fetched.began,
        }
    return figures


def bare_client(place: Place) -> Figures:
    """boto3's upload of a file with as many random bytes."""
    path = place.folder / "bytes"
    with path.open("wb") as file:
        for _ in range(place.mebibytes):
            file.write(os.urandom(1 << 20))
    _sync_files(place.folder)
    done = _client("up", path, "bare/bytes", place, place.subject("none"))
    return {
        "dump_s": done.wall_s,
        "dump_cpu_s": done.cpu_s,
        "transfer_s": float(done.out),
        "stored_mib": place.mebibytes,
    }


@dataclass(frozen=True)
class Crcli:
    """crcli with a store of one kind: dumped living, dumped and killed, restored, changed, dumped again."""

    url: Callable[[Place, str], str]
    env: Callable[[Place], dict[str, str]] = field(default=lambda _: {})

    def __call__(self, place: Place) -> Figures:
        """Take all figures of one round."""
        with place.subject("subject") as subject:
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
            restored = self._restore(place, subject)
            figures |= {
                "ready_ms": restored.json["ready_ms"],
                "restore_s": restored.wall_s,
                "restore_cpu_s": restored.cpu_s,
                "ran_again_s": subject.ask()["ran_again_at"] - restored.began,
            }
            subject.change()
            second = self._dump(place, subject, "killed")
            subject.died()
            figures |= {
                "second_s": second.wall_s,
                "second_mib": second.json["stored_bytes"] / 2**20,
                "second_frozen_ms": second.json["frozen_ms"],
            }
            again = self._restore(place, subject)
            subject.ask()
            figures["dump_peak_mib"] = max(ran.peak_mib for ran in (living, first, second))
            figures["restore_peak_mib"] = max(ran.peak_mib for ran in (restored, again))
        return figures

    def _dump(self, place: Place, subject: Subject, store: str, *options: str) -> Ran:
        return self._run(place, subject, store, "dump", str(subject.pid), "--name", "subject", *options)

    def _restore(self, place: Place, subject: Subject) -> Ran:
        done = self._run(place, subject, "killed", "restore", "subject")
        subject.came_back(done.json["host_pid"])
        return done

    def _run(self, place: Place, subject: Subject, store: str, *arguments: str) -> Ran:
        command = [sys.executable, "-m", "crcli", *arguments, "--store", self.url(place, store), "--json"]
        logs, rates = str(place.folder / "logs"), str(place.folder / "rates.json")
        cache = str(place.folder / "cache")
        env = {"CRCLI_LOG_DIR": logs, "CRCLI_RATES": rates, "CRCLI_CACHE_DIR": cache, **self.env(place)}
        os.sync()
        return run(command, subject.limit_s, env)


WAYS: dict[str, Callable[[Place], Figures]] = {
    "criu": raw,
    "script": script,
    "boto3": bare_client,
    "crcli file": Crcli(lambda place, store: f"file://{place.folder}/{store}"),
    "crcli s3": Crcli(
        lambda place, store: place.server.url(f"crcli/{store}"), lambda place: place.server.env
    ),
}


def clean_up(place: Place) -> None:
    """Remove what a round left in its folder and in the object store."""
    shutil.rmtree(place.folder, ignore_errors=True)
    client, bucket = place.server.client(), place.server.bucket
    while objects := client.list_objects_v2(Bucket=bucket).get("Contents"):
        client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": found["Key"]} for found in objects]})


def _criu_dump(subject: Subject, images: Path, *options: str) -> tuple[Ran, Path]:
    """Dump with CRIU's command line; return what it cost, and its statistics' path."""
    images.mkdir()
    os.sync()
    command = [*criu_command(), "dump", "-t", str(subject.pid), "-D", str(images), "-o", "dump.log", *options]
    done = run(command, subject.limit_s)
    statistics = subject.folder / f"stats{len(options)}"
    shutil.copy(images / "stats-dump", statistics)
    return done, statistics


def _criu_restore(subject: Subject, images: Path) -> Ran:
    command = [*criu_command(), "restore", "-d", "-D", str(images), "-o", "restore.log"]
    done = run(command, subject.limit_s)
    subject.came_back(subject.pid)
    return done


def _frozen_ms(statistics: Path) -> float:
    """CRIU's own word for how long the tree stood frozen."""
    from pycriu.images.stats_pb2 import stats_entry

    data = statistics.read_bytes()
    (size,) = struct.unpack_from("<I", data, 8)
    return float(stats_entry.FromString(data[12 : 12 + size]).dump.frozen_time) / 1000


def _client(direction: str, path: Path, key: str, place: Place, subject: Subject) -> Ran:
    command = [sys.executable, "-m", "tests.bench.client", direction, str(path), place.server.bucket, key]
    return run(command, subject.limit_s, place.server.env)


def _shell(line: str, subject: Subject) -> Ran:
    return run(["bash", "-c", f"set -o pipefail; {line}"], subject.limit_s)


def _sync_files(folder: Path) -> None:
    """Make a folder's files durable, as a store of crcli's is when a dump returns."""
    subprocess.run(["sync", *(str(path) for path in folder.iterdir() if path.is_file())], check=True)


def _size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


__all__ = ["WAYS", "BenchError", "Figures", "Place", "clean_up"]

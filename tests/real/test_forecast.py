"""The forecast of a dump beside the fact, for several kinds of memory, stores and trees."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crcli.memory.pagemap import AddressSpace, PageRun
from crcli.memory.sample import Sampler, Subject, _Pieces
from crcli.process.tree import read_process
from tests.support.crcli import Crcli, assert_goes_on, counter
from tests.support.programs import Program, spawn_python, then_wait
from tests.support.s3servers import start_moto

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

MIB = 1 << 20
SAID_OF_A_PROCESS = 1 << 10
"""So many bytes more, for each process, are stored in some dumps than in others, with not one page new."""

KINDS = {
    "random": "memory = bytearray(os.urandom(64 << 20))",
    "half-zero": """
        memory = bytearray(64 << 20)
        for at in range(0, 64 << 20, 1 << 20):
            memory[at : at + (1 << 20)] = bytes(1 << 20) if at >> 20 & 1 else os.urandom(1 << 20)
        """,
    "heap": "memory = [{'key': str(number), 'list': [number] * 9} for number in range(180_000)]",
    "text": """
        lines = (f"{number} bottles stand on the wall, {number * 7919}" for number in range(1_500_000))
        memory = "\\n".join(lines)
        """,
    "one-line": "memory = b'the quick brown fox jumps over the lazy dog\\n' * (64 << 14)",
    "children": """
        import signal
        memory = os.urandom(8 << 20)
        told, tell = os.pipe()
        for _ in range(7):
            if os.fork() == 0:
                own = os.urandom(2 << 20)
                os.write(tell, b".")
                while True:
                    signal.pause()
        for _ in range(7):
            os.read(told, 1)  # the children have their memory before anybody says that he is ready
        """,
    "shared": """
        import mmap
        memory = mmap.mmap(-1, 64 << 20)
        memory[: 48 << 20] = os.urandom(48 << 20)
        if os.fork() == 0:
            sum(memory[at] for at in range(0, 64 << 20, 4096))
        """,
    "a-file": """
        memory = open("{folder}/log", "wb", buffering=0)
        memory.write(os.urandom(40 << 20))
        own = bytearray(os.urandom(24 << 20))
        """,
}
"""Programs with 64 MiB of state."""


@contextmanager
def holding(kind: str, folder: Path) -> Iterator[Program]:
    """A program with this kind of memory, children included."""
    code = then_wait("import os\n" + _dedented(KINDS[kind].replace("{folder}", str(folder))))
    with spawn_python(code) as program:
        program.wait_for("ready")
        yield program


def _dedented(code: str) -> str:
    lines = code.splitlines()
    return "\n".join(line.removeprefix("        ") for line in lines)


def within_two(forecast: dict[str, Any], fact: dict[str, Any]) -> bool:
    """Whether the bytes that a forecast names are those of the report, within a factor of two.

    But for what is stored of each process beside its pages: no sample of the memory tells that.
    """
    stored, open_question = fact["stored_bytes"], SAID_OF_A_PROCESS * fact["processes"]
    return bool((stored - open_question) / 2 <= forecast["stored_bytes"] <= stored * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_will_be_stored_is_forecast_within_a_factor_of_two(
    crcli: Crcli, kind: str, tmp_path: Path
) -> None:
    """Before a first dump and before a second one of the same tree, by the dry run and by the dump itself."""
    with holding(kind, tmp_path) as program:
        first = crcli.dump(program.pid, "--dry-run")["forecast"]
        report = crcli.dump(program.pid, "--leave-running")
        assert within_two(first, report), (first, report)
        assert within_two(report["forecast"], report), report
        second = crcli.dump(program.pid, "--dry-run")["forecast"]
        again = crcli.dump(program.pid, "--leave-running")
        assert again["stored_bytes"] < report["stored_bytes"] / 3
        assert within_two(second, again), (second, again)
        assert again["forecast"]["stored_bytes"] < first["stored_bytes"] / 3


def test_a_twin_of_what_the_store_has_is_forecast_as_such(crcli: Crcli) -> None:
    """Another process with the same memory at other addresses will store next to nothing."""
    code = then_wait("import random\nmemory = random.Random(7).randbytes(64 << 20)")
    with spawn_python(code) as first, spawn_python(code) as second:
        assert crcli.dump(first.pid, "--dry-run")["forecast"]["stored_bytes"] > 48 * MIB
        crcli.dump(first.pid)
        forecast = crcli.dump(second.pid, "--dry-run")["forecast"]
        report = crcli.dump(second.pid)
    assert within_two(forecast, report), (forecast, report)
    assert forecast["stored_bytes"] < 8 * MIB


def test_memory_that_was_never_written_counts_for_nothing(crcli: Crcli) -> None:
    """What was only reserved, or only read, is not sent by CRIU and not in the forecast."""
    code = """
        import mmap
        reserved = mmap.mmap(-1, 4 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        read = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        sum(read[at] for at in range(0, 256 << 20, 4096))
        """
    with spawn_python(then_wait(code)) as program:
        forecast = crcli.dump(program.pid, "--dry-run")["forecast"]
        report = crcli.dump(program.pid)
    assert within_two(forecast, report) and within_two(report["forecast"], report), (forecast, report)


def test_an_s3_store_is_forecast_as_well(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also there the second dump is known to store little."""
    with start_moto() as server, spawn_python(counter(kilobytes=64 << 10)) as program:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        for most in (128 * MIB, MIB):
            arguments = (str(program.pid), "--store", server.url("images"), "--json")
            forecast = crcli.run("dump", *arguments, "--dry-run").json["forecast"]
            report = crcli.run("dump", *arguments, "--leave-running").json
            assert within_two(forecast, report) and report["stored_bytes"] < most, (forecast, report)


def test_check_shows_the_forecast_and_disturbs_nobody(crcli: Crcli, tmp_path: Path) -> None:
    """Three figures as JSON and in one line; the tree counts on, and no store comes into being."""
    with spawn_python(counter(kilobytes=1 << 10)) as program:
        arguments = ("check", str(program.pid), "--store", crcli.store)
        found = crcli.run(*arguments, "--json").json
        shown = crcli.run(*arguments).out
        assert_goes_on(program)
    assert set(found["forecast"]) == {"frozen_ms", "stored_bytes", "total_ms"}
    assert all(value > 0 for value in found["forecast"].values())
    assert "forecast: frozen for " in shown
    assert not (tmp_path / "store").exists()


def test_a_process_that_ends_while_it_is_sampled_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are gone when they are to be read."""
    with spawn_python(counter(kilobytes=1 << 10)) as program:
        draw = _Pieces.draw

        def and_kill(pieces: _Pieces, most: int) -> list[int]:
            program.process.kill()
            program.process.wait()
            return draw(pieces, most)

        with Sampler([Subject(program.pid, 1 << 20)], None, lambda _: 1.0, 0.1) as sampler:
            monkeypatch.setattr(_Pieces, "draw", and_kill)
            makeup = sampler.makeup()
    assert makeup.zero == makeup.reused == 0


def test_memory_that_is_reserved_and_hardly_used_is_not_searched_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program under a sanitizer reserves 16 TiB and uses little of it: that took half a minute, in which a
    tree that was to be killed stood still. What is not come upon in time counts as new."""
    code = """
        import ctypes
        map = ctypes.CDLL(None).mmap
        map.restype, map.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4)
        at = map(None, 16 << 40, 3, 0x4022, -1, 0)  # private, anonymous, MAP_NORESERVE
        ctypes.memset(at + (9 << 40), 1, 8 << 20)
        """
    searched = []
    sent = AddressSpace.sent

    def note(space: AddressSpace, part: PageRun) -> Iterator[PageRun]:
        searched.append(part)
        return sent(space, part)

    monkeypatch.setattr(AddressSpace, "sent", note)
    with spawn_python(then_wait(code)) as program:
        expected = read_process(program.pid).anonymous_bytes
        with Sampler([Subject(program.pid, expected)], None, lambda _: 1.0, 0.02) as sampler:
            makeup = sampler.makeup()
    assert len([part for part in searched if part.end - part.start == 1 << 20]) < 1000
    assert makeup.total == pytest.approx(expected, rel=0.1) and makeup.new >= 8 << 20


def test_a_tree_that_cannot_be_dumped_has_no_forecast(crcli: Crcli) -> None:
    """It would say how long something takes that does not happen."""
    code = """
        import ctypes
        fd = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120))  # io_uring_setup
        print(f"{fd=}")
        """
    with spawn_python(then_wait(code)) as program:
        if program.value_of("fd") == "-1":
            pytest.skip("this kernel does not permit io_uring")
        found = crcli.run("check", str(program.pid), "--store", crcli.store, "--json", code=10).json
    assert found["forecast"] is None


def findings_with(crcli: Crcli, pid: int, store: str) -> tuple[set[str], set[str]]:
    """What `check` finds in the way of a dump to this store, and what the dry run finds."""
    found = crcli.run("check", str(pid), "--store", store, "--json", code=10).json
    dry = crcli.run("dump", str(pid), "--store", store, "--dry-run", "--json", code=10).json
    assert found["forecast"] is None or "store-full" in {one["name"] for one in found["findings"]}
    first, second = ({one["name"] for one in report["findings"]} for report in (found, dry["error"]))
    return first, second


def test_a_store_that_cannot_be_used_is_in_the_way(crcli: Crcli, tmp_path: Path) -> None:
    """check and the dry run say so, and still say everything else."""
    (tmp_path / "file").write_text("")
    with spawn_python(counter()) as program:
        for store in (f"file://{tmp_path}/file", f"file://{tmp_path}/file/below"):
            for names in findings_with(crcli, program.pid, store):
                assert {"store-silent", "files-written"} <= names


def test_a_disk_that_is_full_or_read_only_is_in_the_way(crcli: Crcli, tmp_path: Path) -> None:
    """Where the dump would find it out with the tree frozen, or right before; a store with room is not."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "crcli-test", str(tmp_path)], check=True)
    try:
        store = f"file://{tmp_path}/store"
        with spawn_python(counter()) as program:
            crcli.run("check", str(program.pid), "--store", store)
            assert not list(tmp_path.iterdir()), "check wrote something"
            (tmp_path / "other").write_bytes(bytes(4 << 20))
            for names in findings_with(crcli, program.pid, store):
                assert "store-full" in names
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
            for names in findings_with(crcli, program.pid, store):
                assert "store-silent" in names
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_every_report_says_forecast_beside_fact(crcli: Crcli) -> None:
    """As JSON, and in one line for people."""
    with spawn_python(counter()) as program:
        report = crcli.dump(program.pid, "--leave-running")
        shown = crcli.run("dump", str(program.pid), "--store", crcli.store).out
    assert set(report["forecast"]) == {"frozen_ms", "stored_bytes", "total_ms"}
    (line,) = [line for line in shown.splitlines() if "forecast / fact" in line]
    assert line.count(" / ") == 4


def test_forecasts_come_from_the_dumps_that_this_host_made(crcli: Crcli, tmp_path: Path) -> None:
    """Each dump is learned from, and a host whose dumps were slow forecasts slow ones."""
    path = tmp_path / "rates.json"
    with spawn_python(counter()) as program:
        crcli.dump(program.pid, "--leave-running")
        learned = json.loads(path.read_text())
        assert {step["seen"] for step in learned["steps"].values()} == {1}
        before = crcli.dump(program.pid, "--leave-running", "--dry-run")["forecast"]
        for name in ("take", f"ship {crcli.store}"):
            for rate in learned["steps"][name]["rates"]:
                learned["steps"][name]["rates"][rate] *= 20
        path.write_text(json.dumps(learned))
        slow = crcli.dump(program.pid, "--leave-running", "--dry-run")["forecast"]
    assert slow["frozen_ms"] > 2 * before["frozen_ms"] and slow["total_ms"] > 2 * before["total_ms"]


def test_a_dump_needs_no_rates(crcli: Crcli, tmp_path: Path) -> None:
    """With a damaged file that cannot be replaced either, a dump goes as ever."""
    (tmp_path / "rates.json").mkdir()
    with spawn_python(counter()) as program:
        report = crcli.dump(program.pid, "--leave-running")
        assert report["outcome"] == "running" and report["forecast"]["total_ms"] > 0
        assert_goes_on(program)

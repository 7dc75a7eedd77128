"""A tree and crcli in one memory cgroup, as in a container, that has too little room for both."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.crcli import COMMAND_LIMIT_SECONDS, Crcli, assert_goes_on, counter, tree_of, wait_until
from tests.support.programs import spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

MIB, UNLIMITED = 1 << 20, 1 << 40


class Group:
    """A memory cgroup below our own (version 1 or 2)."""

    def __init__(self) -> None:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        old = next((path for _, names, path in lines if "memory" in names.split(",")), None)
        new = next((path for _, names, path in lines if not names), "/")
        self._own = Path("/sys/fs/cgroup", f"memory{old}" if old is not None else new.lstrip("/"))
        self._is_old = old is not None
        self._path = self._own / f"crcli-test-{os.getpid()}"
        try:
            self._path.mkdir()
            self.limit(UNLIMITED)
        except OSError as error:
            with suppress(OSError):
                self._path.rmdir()
            pytest.skip(f"no memory cgroup can be made here: {error}")

    @contextmanager
    def joined(self) -> Iterator[None]:
        """What is started within the block is in the group."""
        (self._path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._own / "cgroup.procs").write_text(str(os.getpid()))

    def used(self) -> int:
        """Bytes that are in use."""
        name = "memory.usage_in_bytes" if self._is_old else "memory.current"
        return int((self._path / name).read_text())

    def limit(self, size: int) -> None:
        """Have it use no more (bytes)."""
        name = "memory.limit_in_bytes" if self._is_old else "memory.max"
        (self._path / name).write_text(str(size))

    def is_empty(self) -> bool:
        """Whether nobody is in it."""
        return not (self._path / "cgroup.procs").read_text()

    def close(self) -> None:
        """Remove it, empty as it is."""
        wait_until(self.is_empty, "somebody is in it")
        self._path.rmdir()


@pytest.fixture
def group() -> Iterator[Group]:
    """A memory cgroup of the test's own."""
    made = Group()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("options", [(), ("--leave-running",)], ids=["killed", "running"])
def test_the_tree_is_not_what_has_to_go(options: tuple[str, ...], crcli: Crcli, group: Group) -> None:
    """The kernel would end the largest in the group, the tree; it ends crcli, and the tree runs on."""
    with ExitStack() as held:
        with group.joined():
            program = held.enter_context(spawn_python(counter(kilobytes=100 << 10)))
        group.limit(group.used() + 32 * MIB)
        with group.joined():
            command = held.enter_context(
                crcli.start("dump", str(program.pid), "--store", crcli.store, *options)
            )
        out, err = command.communicate(timeout=COMMAND_LIMIT_SECONDS)
        assert command.returncode == -signal.SIGKILL, f"there was room enough: {out}\n{err}"
        assert_goes_on(program)
        group.limit(UNLIMITED)
        crcli.dump(program.pid, "--leave-running")
        assert_goes_on(program)


def test_a_restore_without_room_leaves_nothing(crcli: Crcli, group: Group) -> None:
    """The kernel ends crcli and CRIU, not who clears away after them: no process and no file stays."""
    carried = crcli.folder / "carried"
    code = f"file = open({str(carried)!r}, 'w'); file.write('1'); file.flush()\n"
    code += counter(kilobytes=40 << 10)
    with spawn_python(code) as program:
        image = crcli.dump(program.pid)["image"]
        carried.unlink()
        for share in (20, 24, 28, 32, 36, 40, 44):
            group.limit(share * MIB + group.used())
            with ExitStack() as held:
                with group.joined():
                    arguments = ("restore", image, "--store", crcli.store, "--force-guard", "memory")
                    command = held.enter_context(crcli.start(*arguments))
                out, err = command.communicate(timeout=COMMAND_LIMIT_SECONDS)
            ends = (-signal.SIGKILL, 21)  # the kernel took us, or CRIU alone
            assert command.returncode in ends, f"there was room enough: {out}\n{err}"
            wait_until(group.is_empty, f"with {share} MiB a process stays")
            assert not carried.exists(), f"with {share} MiB a file stays"
        group.limit(UNLIMITED)
        crcli.restore(image)
        assert_goes_on(program)


@pytest.mark.parametrize("score", [0, 300])
def test_a_restored_tree_goes_no_sooner_than_before(score: int, crcli: Crcli) -> None:
    """That crcli and CRIU go first where memory runs out, while they restore, is not for the tree."""
    code = f"open('/proc/self/oom_score_adj', 'w').write('{score}')\n"
    code += "import os, time\nif os.fork() == 0: time.sleep(1000)\n" + counter()
    with spawn_python(code) as program:
        done = crcli.restore(crcli.dump(program.pid)["image"])
        scores = [Path(f"/proc/{one.pid}/oom_score_adj").read_text() for one in tree_of(done["host_pid"])]
        assert scores == [f"{score}\n"] * 2

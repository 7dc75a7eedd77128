"""Restores at once: what only one tree can have, one gets, and nobody loses it to another that fails."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from crcli.criu.binary import criu_command
from tests.support.crcli import COMMAND_LIMIT_SECONDS, Crcli, reap, tree_of, wait_until
from tests.support.programs import spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

LISTENS = "import socket; listener = socket.create_server(('127.0.0.1', 0))"
WRITES = "file = open({!r}, 'w+'); file.write('ours'); file.flush()"


@contextmanager
def held_before_criu(crcli: Crcli, image: str, *options: str) -> Iterator[tuple[Popen[str], Path]]:
    """A restore that has looked at the host, and whose CRIU does nothing before the file is there that goes
    with it."""
    criu, here, go_on = (crcli.folder / name for name in ("slow-criu", "here", "go-on"))
    held = f'if [ "$1" = swrk ]; then touch {here}; until [ -e {go_on} ]; do sleep 0.02; done; fi'
    criu.write_text(f'#!/bin/sh\n{held}\nexec {shlex.join(criu_command())} "$@"\n')
    criu.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRCLI_CRIU", str(criu))
        with crcli.start("restore", image, "--store", crcli.store, "--json", *options) as restore:
            patch.undo()
            wait_until(here.exists, "CRIU was not started")
            yield restore, go_on


@contextmanager
def another(crcli: Crcli, image: str, *options: str) -> Iterator[Popen[str]]:
    """A second restore, which has had the time for all that it does without waiting."""
    with crcli.start("restore", image, "--store", crcli.store, "--json", *options) as restore:
        end = time.monotonic() + 3
        while restore.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        yield restore


def end_of(crcli: Crcli, restore: Popen[str]) -> int:
    """The exit code of a restore; what it has restored is ended with the test."""
    out, _ = restore.communicate(timeout=COMMAND_LIMIT_SECONDS)
    if restore.returncode == 0:
        crcli.adopt(json.loads(out)["host_pid"])
    return restore.returncode


def test_one_port_goes_to_one_of_two_restores(crcli: Crcli) -> None:
    """The other waits, and is refused. CRIU would have both trees listen there."""
    with spawn_python(then_wait(LISTENS)) as program:
        image = crcli.dump(program.pid)["image"]
        options = ("--pid-namespace", "new")
        with (
            held_before_criu(crcli, image, *options) as (first, go_on),
            another(crcli, image, *options) as second,
        ):
            go_on.touch()
            assert (end_of(crcli, first), end_of(crcli, second)) == (0, 20)


def test_a_restore_that_fails_takes_no_file_away_from_another(crcli: Crcli, tmp_path: Path) -> None:
    """A file that was laid out goes when that restore is killed: the other waits for that, and lays out its
    own."""
    file = tmp_path / "file"
    with spawn_python(then_wait(WRITES.format(str(file)))) as program:
        image = crcli.dump(program.pid)["image"]
        file.unlink()
        with held_before_criu(crcli, image) as (first, _):
            wait_until(file.exists, "the file was not laid out")
            with another(crcli, image) as second:
                left = tree_of(first.pid)[1:]
                first.kill()
                reap(left)
                assert end_of(crcli, second) == 0
        assert file.read_text() == "ours"

"""CRIU itself, without anything that crcli knows: a request with exactly these options, and the log of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crcli.criu.binary import criu_command
from crcli.criu.options import LOG_NAME
from crcli.criu.rpc import CriuDied, CriuProcess, CriuTimeout, rpc

LIMIT_SECONDS = 20.0

_LEAST_LEVELS = {rpc.DUMP: 3, rpc.RESTORE: 2}
"""How much crcli has CRIU log, at least: causes must be found in that."""


@dataclass(frozen=True)
class Attempt:
    """What came of one request: whether CRIU says that it worked, and its whole log."""

    success: bool
    log: str


def raw_dump(pid: int, folder: Path, *, answer_limits: bool = False, **options: Any) -> Attempt:
    """Have CRIU dump a tree into this folder, with these options and no others."""
    return _request(rpc.DUMP, folder, {"pid": pid} | options, answer_limits)


def raw_restore(folder: Path, **options: Any) -> Attempt:
    """Have CRIU restore what is in this folder, as children of ours."""
    return _request(rpc.RESTORE, folder, {"rst_sibling": True} | options)


@contextmanager
def started_with(before: str, folder: Path) -> Iterator[None]:
    """Within the block CRIU is started by a shell that does this first ("ulimit -n 40; exec")."""
    script = folder / "criu-started-with"
    script.write_text(f'#!/bin/sh\n{before} {" ".join(criu_command())} "$@"\n')
    script.chmod(0o755)
    os.environ["CRCLI_CRIU"] = str(script)
    try:
        yield
    finally:
        del os.environ["CRCLI_CRIU"]


def _request(kind: int, folder: Path, options: dict[str, Any], answer_limits: bool = False) -> Attempt:
    images = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        return _asked(kind, folder, images, options, answer_limits)
    finally:
        os.close(images)


def _asked(kind: int, folder: Path, images: int, options: dict[str, Any], answer_limits: bool) -> Attempt:
    wanted = rpc.criu_opts(
        images_dir_fd=-1,
        images_dir=f"/proc/self/fd/{images}",  # CRIU 4.1 wants a link here
        log_level=_LEAST_LEVELS[kind],
        log_file=LOG_NAME,
        notify_scripts=True,
    )
    page_channel = options.pop("page_channel", None)
    if page_channel is not None:
        wanted.ps.fd = page_channel
    for name, value in options.items():
        setattr(wanted, name, value)
    log = folder / LOG_NAME
    log.unlink(missing_ok=True)
    passed = [images] if page_channel is None else [images, page_channel]
    said, success = "", False
    with CriuProcess.start(passed, answer_limits) as criu:
        try:
            answer = criu.request(kind, wanted, lambda *_: True, LIMIT_SECONDS)
            success, said = answer.success, answer.message
        except (CriuDied, CriuTimeout) as error:
            said = repr(error)
    return Attempt(success, log.read_text(errors="replace") if log.exists() else said)

"""One store after another for the suite: a directory, and S3 as spoken by several servers.

| leg          | what it stands for                                                                     |
|--------------|----------------------------------------------------------------------------------------|
| file         | a directory                                                                            |
| moto         | S3 over plain HTTP                                                                     |
| moto-tls     | S3 over TLS, as in production, with an authority of our own                            |
| moto-ignores | a store that ignores `If-None-Match` on writes                                         |
| moto-refuses | a store that refuses `If-None-Match` on writes with 501                                |
| swift        | a real object server, which enforces signatures and digests                            |
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import botocore.session
import pytest

from crcli.store import open_store
from tests.support.s3servers import start_moto, start_swift

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from crcli.store import Store
    from tests.support.s3servers import S3Server

STARTERS: dict[str, Callable[[], S3Server]] = {
    "moto": start_moto,
    "moto-tls": lambda: start_moto(tls=True),
    "moto-ignores": lambda: start_moto(conditions="ignored"),
    "moto-refuses": lambda: start_moto(conditions="refused"),
    "swift": start_swift,
}
LEGS = ("file", *STARTERS)
_prefixes = itertools.count()


class Servers:
    """The S3 servers of a test session, each started by the first test that asks for it."""

    def __init__(self) -> None:
        self._running: dict[str, S3Server] = {}

    def __getitem__(self, leg: str) -> S3Server:
        if leg not in self._running:
            self._running[leg] = STARTERS[leg]()
        return self._running[leg]

    def close(self) -> None:
        """Kill them all."""
        for server in self._running.values():
            server.close()


@dataclass
class Place:
    """Where a test's store is, and what its environment must hold for it to be reached."""

    leg: str
    url: str
    env: dict[str, str]


@pytest.fixture(scope="session", autouse=True)
def models_read_once() -> Iterator[None]:
    """Read botocore's descriptions of AWS once, not for each of some hundred clients: half a minute less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The S3 servers by the name of their leg."""
    running = Servers()
    yield running
    running.close()


@pytest.fixture
def s3(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], S3Server]:
    """Choose a server: it runs, and this process's environment leads to it."""

    def choose(leg: str) -> S3Server:
        server = servers[leg]
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        return server

    return choose


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return f"test-{next(_prefixes)}"


@pytest.fixture(params=LEGS)
def place(
    request: pytest.FixtureRequest, s3: Callable[[str], S3Server], tmp_path: Path, prefix: str
) -> Place:
    """A place for a store that nobody has written to yet, on every leg in turn."""
    if request.param == "file":
        return Place("file", f"file://{tmp_path}/store", {})
    server = s3(request.param)
    return Place(request.param, server.url(prefix), server.env)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    """The store at that place, ready for writing."""
    opened = open_store(place.url, patience_s=5)
    opened.warm(for_writing=True)
    yield opened
    opened.close()

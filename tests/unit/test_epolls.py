"""Epolls whose targets cannot be found are told from those that only look so while a program is busy."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from crcli.process.epolls import epolls_astray
from crcli.process.files import open_files


@pytest.fixture
def epoll() -> Iterator[select.epoll]:
    """An epoll of our own."""
    with select.epoll() as made:
        yield made


def test_a_target_that_was_opened_while_files_were_listed_is_not_astray(epoll: select.epoll) -> None:
    """The list has no file yet that the epoll, which is read later, waits for."""
    reader, writer = os.pipe()
    epoll.register(reader, select.EPOLLIN)
    files = [file for file in open_files(os.getpid()) if file.fd not in (reader, writer)]
    assert epolls_astray(files) == ()
    os.close(writer)
    os.close(reader)


def test_an_epoll_that_a_child_has_too_is_its_parents(epoll: select.epoll) -> None:
    """The parent adds a file of its own between two looks: the child has the epoll, but not the file."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        parents = open_files(os.getpid())
        reader, writer = os.pipe()
        epoll.register(reader, select.EPOLLIN)
        assert epolls_astray([*parents, *open_files(child)]) == ()
        os.close(writer)
        os.close(reader)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_target_that_only_another_descriptor_keeps_open_elsewhere_is_astray(epoll: select.epoll) -> None:
    """What its process has closed and a child still has open stays in the epoll, and is found astray."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        epoll.register(reader, select.EPOLLIN)
        os.close(reader)
        assert [one.fd for one in epolls_astray(open_files(os.getpid()))] == [epoll.fileno()]
    finally:
        os.close(writer)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

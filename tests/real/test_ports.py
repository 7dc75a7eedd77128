"""`restore --port OLD=NEW`: servers that listen elsewhere afterwards, and their connections."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from tests.support.crcli import Crcli, launched, wait_until
from tests.support.programs import spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

ECHO = """
    import os, socket, threading, time
    def serve(listener):
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    def answer(peer):
        for line in peer.makefile("rb"):
            peer.sendall(b"%s %d %d\\n" % (line.strip(), os.getpid(), peer.getsockname()[1]))

    def in_the_background(function, *arguments):
        threading.Thread(target=function, args=arguments, daemon=True).start()

    """
FOREVER = "\n    os.write(1, b'ready\\n')\n    while True: time.sleep(0.05)\n"


def free_ports(count: int) -> list[int]:
    """Ports that nothing has, neither for TCP nor for UDP."""
    held = []
    for _ in range(count):
        held.append(socket.create_server(("", 0)))
        with suppress(OSError):
            held.append(socket.socket(type=socket.SOCK_DGRAM))
            held[-1].bind(held[-2].getsockname())
    ports = [one.getsockname()[1] for one in held if one.type == socket.SOCK_STREAM]
    for one in held:
        one.close()
    return ports


@contextmanager
def client(port: int, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A connection to a port of this host."""
    with socket.create_connection((host, port), timeout=10) as peer:
        yield peer


def ask(peer: socket.socket, word: bytes = b"hello") -> list[bytes]:
    """Say a word, and return the words of the answer."""
    peer.sendall(word + b"\n")
    return peer.makefile("rb").readline().split()


def ask_at(port: int, host: str = "127.0.0.1") -> list[bytes]:
    """The answer of whoever listens there now."""
    with client(port, host) as peer:
        return ask(peer)


def listens(port: int) -> bool:
    """Whether something listens on this TCP port."""
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def refused(crcli: Crcli, image: str, *options: str) -> dict[str, Any]:
    """Restore, and return the error of a guard that refused it: nothing was started."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    error: dict[str, Any] = crcli.restore(image, *options, code=20)["error"]
    assert error["state"] == "untouched" and error["hint"]
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    return error


def test_http_server_of_python_moves(crcli: Crcli, tmp_path: Path) -> None:
    """`python -m http.server` answers on the new port, and nobody does on the old one."""
    old, new = free_ports(2)
    (tmp_path / "page").write_text("hello")
    command = [sys.executable, "-m", "http.server", str(old), "--directory", str(tmp_path)]
    with launched(command, tmp_path) as program:
        wait_until(lambda: listens(old), "it does not listen")
        crcli.move(program.pid, "--port", f"{old}={new}")
        assert urlopen(f"http://127.0.0.1:{new}/page", timeout=10).read() == b"hello"
        assert not listens(old)


def test_a_server_of_both_kinds_of_addresses_moves(crcli: Crcli) -> None:
    """A server on [::] takes IPv4 and IPv6 on the new port; a unix socket beside it is where it was."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    old, new = free_ports(2)
    code = f"""
    serve_on = socket.create_server(("::", {old}), family=socket.AF_INET6, dualstack_ipv6=True)
    in_the_background(serve, serve_on)
    beside = socket.socket(socket.AF_UNIX)
    beside.bind("\\0crcli-test-{old}")
    beside.listen()
    """
    with spawn_python(ECHO + code + FOREVER) as program:
        crcli.move(program.pid, "--port", f"{old}={new}")
        for host in ("127.0.0.1", "::1"):
            assert ask_at(new, host)[2] == b"%d" % new
        assert not listens(old)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"\0crcli-test-{old}")


def test_all_of_a_group_moves(crcli: Crcli) -> None:
    """Processes that share a port with SO_REUSEPORT share the new one, a child's inherited listener too."""
    old, new = free_ports(2)
    code = f"""
    def listen():
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", {old}))
        listener.listen()
        return listener

    mine = listen()
    if os.fork() == 0:
        mine.close()
        mine = listen()
    in_the_background(serve, mine)
    """
    with spawn_python(ECHO + code + FOREVER) as program:
        wait_until(lambda: program.output.count("ready") == 2, "the child is late")
        crcli.move(program.pid, "--port", f"{old}={new}")
        answered: set[bytes] = set()
        wait_until(lambda: len(answered.add(ask_at(new)[1]) or answered) == 2, "one of them is not asked")  # type: ignore[func-returns-value]
        assert not listens(old)


def test_connections_inside_move_along(crcli: Crcli) -> None:
    """A connection of the tree with itself loses no byte, beside the original that runs on with its own."""
    old, new = free_ports(2)
    code = f"""
    listener = socket.create_server(("127.0.0.1", {old}))
    in_the_background(serve, listener)
    peer = socket.create_connection(("127.0.0.1", {old}))
    lines = peer.makefile("rb")
    print("ready")
    for number in range(10**9):
        peer.sendall(b"%d\\n" % number)
        asked, _, port = lines.readline().split()
        assert int(asked) == number and int(port) == peer.getpeername()[1]
        open(os.environ["CRCLI_TEST_AT"] + str(peer.getpeername()[1]), "w").write(str(number))
        time.sleep(0.01)
    """
    with spawn_python(ECHO + code, env=os.environ | {"CRCLI_TEST_AT": f"{crcli.folder}/at-"}) as program:

        def reached(port: int) -> int:
            path = crcli.folder / f"at-{port}"
            return int(path.read_text() or 0) if path.exists() else 0

        def moves_on(port: int) -> None:
            before = reached(port)
            wait_until(lambda: reached(port) > before + 5, f"it stands still\n{program.output}")

        moves_on(old)
        image = crcli.dump(program.pid, "--leave-running")["image"]
        crcli.restore(image, "--port", f"{old}={new}")
        moves_on(new)
        moves_on(old)
        assert ask_at(new)[2] == b"%d" % new and ask_at(old)[2] == b"%d" % old
        assert "Error" not in program.output


def test_a_client_that_waited_keeps_its_connection(crcli: Crcli) -> None:
    """A client outside goes on over its connection to the old port; new ones use the new port."""
    old, new = free_ports(2)
    code = f"in_the_background(serve, socket.create_server(('127.0.0.1', {old})))"
    with spawn_python(ECHO + code + FOREVER) as program, client(old) as peer:
        assert ask(peer)[2] == b"%d" % old
        crcli.move(program.pid, "--port", f"{old}={new}")
        assert ask(peer)[2] == b"%d" % old
        assert ask_at(new)[2] == b"%d" % new
        assert not listens(old)


def test_a_client_of_the_original_is_left_to_it(crcli: Crcli) -> None:
    """A copy beside the original does not keep the original's client: it sees that connection closed."""
    old, new = free_ports(2)
    code = f"in_the_background(serve, socket.create_server(('127.0.0.1', {old})))"
    with spawn_python(ECHO + code + FOREVER) as program, client(old) as peer:
        ask(peer)
        image = crcli.dump(program.pid, "--leave-running")["image"]
        crcli.restore(image, "--port", f"{old}={new}")
        assert ask(peer)[1] == b"%d" % program.pid
        assert ask_at(new)[2] == b"%d" % new and ask_at(old)[2] == b"%d" % old


def test_datagrams_come_to_the_new_port(crcli: Crcli) -> None:
    """A UDP server moves, and a socket of the tree that is connected to it finds it there."""
    old, new = free_ports(2)
    code = f"""
    server = socket.socket(type=socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", {old}))
    inside = socket.socket(type=socket.SOCK_DGRAM)
    inside.connect(("127.0.0.1", {old}))
    print("ready")
    while True:
        data, peer = server.recvfrom(100)
        inside.send(data)
        server.sendto(server.recv(100), peer)
    """
    with spawn_python(ECHO + code) as program:
        crcli.move(program.pid, "--port", f"{old}={new}")
        with socket.socket(type=socket.SOCK_DGRAM) as peer:
            peer.settimeout(10)
            peer.connect(("127.0.0.1", new))
            peer.send(b"a")
            assert peer.recv(100) == b"a"


def test_two_servers_can_swap(crcli: Crcli) -> None:
    """Several ports move at once, each to its own, also when they trade places."""
    one, other = sorted(free_ports(2))
    code = f"""
    for port in ({one}, {other}):
        in_the_background(serve, socket.create_server(("127.0.0.1", port)))
    """
    with spawn_python(ECHO + code + FOREVER) as program:
        image = crcli.dump(program.pid)["image"]
        crcli.restore(image, "--port", f"{one}={other}", "--port", f"{other}={one}")
        assert ask_at(one)[2] == b"%d" % one and ask_at(other)[2] == b"%d" % other


def test_ports_that_cannot_be_moved_are_refused(crcli: Crcli) -> None:
    """An old port that nobody listens on, and a new one that is taken here or in the tree, start nothing."""
    old, second, unused = free_ports(3)
    code = f"""
    for host, port in (("127.0.0.1", {old}), ("0.0.0.0", {second})):
        in_the_background(serve, socket.create_server((host, port)))
    """
    with spawn_python(ECHO + code + FOREVER) as program:
        image = crcli.dump(program.pid)["image"]
        error = refused(crcli, image, "--port", f"{unused}=9")
        assert error["findings"][0]["name"] == "port-not-in-image" and f"{old} (tcp)" in error["hint"]
        error = refused(crcli, image, "--port", f"{old}={second}")
        assert error["findings"][0]["name"] == "port-taken" and "the tree itself" in error["message"]
        with socket.create_server(("0.0.0.0", 0)) as taken:
            error = refused(crcli, image, "--port", f"{old}={taken.getsockname()[1]}")
            assert error["findings"][0]["name"] == "port-taken"
        with socket.create_server(("127.0.0.2", 0)) as elsewhere:  # another address: not in the way
            new = elsewhere.getsockname()[1]
            crcli.restore(image, "--port", f"{old}={new}")
            assert ask_at(new)[2] == b"%d" % new

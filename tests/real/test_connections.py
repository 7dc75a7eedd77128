"""Sockets and what becomes of them: inside the tree they live on, to outside it depends on the other side."""

from __future__ import annotations

import ast
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.crcli import Crcli, wait_until
from tests.support.programs import Program, spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

PAIR_INSIDE = """
    import asyncio, os, socket
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    async def serve(reader, writer):
        while line := await reader.readline():
            writer.write(line)
            writer.write(b"x" * 5000 + b"\\n")
            await writer.drain()

    async def ask():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = 0
        while True:
            writer.write(b"%d\\n" % number)
            assert await reader.readline() == b"%d\\n" % number
            assert await reader.readline() == b"x" * 5000 + b"\\n"
            print(f"number={number}")
            number += 1
            await asyncio.sleep(0.005)

    async def server():
        async with await asyncio.start_server(serve, sock=listener) as running:
            await running.serve_forever()

    if os.fork() == 0:
        asyncio.run(server())
    listener.close()
    print("ready")
    asyncio.run(ask())
    """

CLIENT = """
    import itertools, socket, time
    numbers = itertools.count()

    def talk():
        peer = socket.create_connection(("127.0.0.1", {port}), timeout=20)
        lines = peer.makefile("rb")
        print("connected")
        while True:
            number = next(numbers)
            peer.sendall(b"%d\\n" % number)
            answer = lines.readline()
            if not answer:
                raise ConnectionResetError("closed")
            assert int(answer) == number
            print(f"number={{number}}")
            time.sleep(0.01)

    print("ready")
    while True:
        try:
            talk()
        except OSError as error:
            print(f"lost={{type(error).__name__}}")
            time.sleep(0.05)
    """

SERVER = """
    import socket, threading
    listener = socket.{family}
    print(f"at={{listener.getsockname()}}")
    print("ready")
    asked = 0

    def serve(peer):
        global asked
        for line in peer.makefile("rb"):
            asked += 1
            peer.sendall(b"%s %d\\n" % (line.strip(), asked))

    while True:
        peer, _ = listener.accept()
        threading.Thread(target=serve, args=(peer,), daemon=True).start()
    """


class Listener:
    """A server outside of the tree that echoes the lines of one client at a time."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(10)
        self.port = self.socket.getsockname()[1]
        self.peer: socket.socket | None = None
        self.received: list[int] = []

    def accept(self) -> None:
        """Take the next client."""
        self.peer = self.socket.accept()[0]
        self.peer.settimeout(10)
        self.lines = self.peer.makefile("rb")

    def echo(self, count: int) -> None:
        """Answer so many lines."""
        assert self.peer is not None
        for _ in range(count):
            line = self.lines.readline()
            assert line, "the client closed the connection"
            self.received.append(int(line))
            self.peer.sendall(line)

    def hang_up(self) -> None:
        """Forget the client."""
        if self.peer is not None:
            self.lines.close()
            self.peer.close()


@contextmanager
def listening() -> Iterator[Listener]:
    """A server for the length of the block."""
    server = Listener()
    try:
        yield server
    finally:
        server.hang_up()
        server.socket.close()


def number(program: Program) -> int:
    """Return the last number that a program has got back, -1 before the first."""
    return int(program.value_of("number")) if "number=" in program.output else -1


def moves_on(program: Program) -> None:
    """Assert that a program gets answers to further numbers."""
    before = number(program)
    wait_until(lambda: number(program) > before + 5, f"it stands still:\n{program.output[-1000:]}")


def numbers(program: Program) -> list[int]:
    """Return all numbers that a program has got back."""
    values = [line.partition("=")[2] for line in program.output.splitlines() if line.startswith("number=")]
    return [int(value) for value in values]


def test_a_connection_inside_the_tree_loses_no_byte(crcli: Crcli) -> None:
    """asyncio client and server of one tree talk on over the same TCP connection."""
    with spawn_python(PAIR_INSIDE) as program:
        moves_on(program)
        crcli.move(program.pid)
        moves_on(program)
        got = numbers(program)
        assert got == list(range(len(got)))


def test_a_connection_is_kept_while_its_peer_waits_here(crcli: Crcli) -> None:
    """A client whose server on this host still holds the connection goes on where it was."""
    with listening() as server, spawn_python(CLIENT.format(port=server.port)) as program:
        server.accept()
        server.echo(10)
        report = crcli.dump(program.pid)
        crcli.restore(report["image"])
        server.echo(20)
        assert server.received == list(range(30))
        wait_until(lambda: number(program) == 29, "the last answer got lost")
        assert "lost=" not in program.output and program.output.count("connected") == 1


def test_a_connection_whose_peer_is_gone_is_closed(crcli: Crcli) -> None:
    """A client whose server hung up meanwhile sees the connection closed, and connects again."""
    with listening() as server, spawn_python(CLIENT.format(port=server.port)) as program:
        server.accept()
        server.echo(10)
        image = crcli.dump(program.pid)["image"]
        server.hang_up()
        crcli.restore(image)
        server.accept()
        server.echo(10)
        wait_until(lambda: program.output.count("connected") == 2, "it did not connect again")
        assert program.output.count("lost=") == 1


def test_tcp_close_closes_what_could_be_kept(crcli: Crcli) -> None:
    """With --tcp close the client connects again although its server still waits."""
    with listening() as server, spawn_python(CLIENT.format(port=server.port)) as program:
        server.accept()
        server.echo(10)
        crcli.restore(crcli.dump(program.pid)["image"], "--tcp", "close")
        server.accept()
        server.echo(10)
        assert program.output.count("lost=") == 1


def test_a_server_keeps_its_listener_and_its_client(crcli: Crcli) -> None:
    """A client outside gets its next answer over the connection it had, a new one is served as well."""
    with spawn_python(SERVER.format(family="create_server(('127.0.0.1', 0))")) as program:
        port = ast.literal_eval(program.value_of("at"))[1]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"a\n")
            assert client.recv(100) == b"a 1\n"
            image = crcli.dump(program.pid)["image"]
            client.sendall(b"b\n")  # while nobody is there: the kernel sends it again and again
            crcli.restore(image)
            assert client.recv(100) == b"b 2\n"
            with socket.create_connection(("127.0.0.1", port), timeout=10) as another:
                another.sendall(b"c\n")
                assert another.recv(100) == b"c 3\n"


def test_a_dump_that_lets_the_tree_run_loses_no_byte(crcli: Crcli) -> None:
    """With --leave-running a connection to outside only stands still for a moment."""
    with listening() as server, spawn_python(CLIENT.format(port=server.port)) as program:
        server.accept()
        server.echo(10)
        crcli.dump(program.pid, "--leave-running")
        server.echo(20)
        assert server.received == list(range(30)) and "lost=" not in program.output


def test_tcp_keep_keeps_what_nobody_waits_for(crcli: Crcli) -> None:
    """With --tcp keep a connection is restored as it was; the kernel finds out that its peer is gone."""
    with listening() as server, spawn_python(CLIENT.format(port=server.port)) as program:
        server.accept()
        server.echo(10)
        image = crcli.dump(program.pid)["image"]
        server.hang_up()
        crcli.restore(image, "--tcp", "keep")
        server.accept()
        server.echo(10)
        assert program.output.count("lost=") == 1


def test_a_server_of_both_kinds_of_addresses_goes_on(crcli: Crcli) -> None:
    """A server on [::] keeps a client with an IPv4 address and one with an IPv6 address."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    family = "create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True)"
    with spawn_python(SERVER.format(family=family)) as program:
        port = ast.literal_eval(program.value_of("at"))[1]
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as one,
            socket.create_connection(("::1", port), timeout=10) as other,
        ):
            for number, client in enumerate((one, other), 1):
                client.sendall(b"a\n")
                assert client.recv(100) == b"a %d\n" % number
            crcli.move(program.pid)
            for number, client in enumerate((one, other), 3):
                client.sendall(b"b\n")
                assert client.recv(100) == b"b %d\n" % number


def test_a_stream_in_full_flow_loses_no_byte(crcli: Crcli) -> None:
    """What stands in the buffers of a connection, to a slow reader in the tree or outside, arrives once."""
    code = """
        import os, socket, threading, time
        ours, theirs = socket.create_server(("127.0.0.1", 0)), socket.socket()
        theirs.connect(ours.getsockname())
        reader = ours.accept()[0]
        outside = socket.create_connection(("127.0.0.1", {port}))

        def fill(peer):
            for number in range(10**9):
                peer.sendall(b"%07d\\n" % (number % 10**7))

        for peer in (theirs, outside):
            threading.Thread(target=fill, args=(peer,)).start()
        lines = reader.makefile("rb")
        print("ready")
        for number in range(10**9):
            line = lines.readline()
            assert int(line) == number % 10**7, (line, number)
            if number % 1000 == 0:
                print(f"number={{number}}")
                time.sleep(0.02)
        """
    with listening() as server, spawn_python(code.format(port=server.port)) as program:
        server.accept()
        wait_until(lambda: number(program) > 3000, "the reader stands still")
        crcli.move(program.pid)
        before = number(program)
        wait_until(lambda: number(program) > before + 3000, "the reader stands still after the restore", 30)
        for expected in range(500_000):
            assert int(server.lines.readline()) == expected
        assert "Error" not in program.output


def test_datagrams_go_on(crcli: Crcli) -> None:
    """A UDP server answers at the same address, a connected UDP client of its own included."""
    code = """
        import socket
        server = socket.socket(type=socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 0))
        print(f"at={server.getsockname()}")
        inside = socket.socket(type=socket.SOCK_DGRAM)
        inside.connect(server.getsockname())
        print("ready")
        while True:
            data, peer = server.recvfrom(100)
            inside.send(data)
            server.sendto(server.recv(100), peer)
        """
    with spawn_python(code) as program, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect(ast.literal_eval(program.value_of("at")))
        client.send(b"a")
        assert client.recv(100) == b"a"
        crcli.move(program.pid)
        client.send(b"b")
        assert client.recv(100) == b"b"


def test_a_unix_server_is_there_again(crcli: Crcli, tmp_path: Path) -> None:
    """A server on a unix socket is found at the same path, and remembers what it had counted."""
    path = tmp_path / "socket"
    family = f"socket(socket.AF_UNIX); listener.bind({str(path)!r}); listener.listen()"
    with spawn_python(SERVER.format(family=family)) as program:
        with unix_client(path) as client:
            client.sendall(b"a\n")
            assert client.recv(100) == b"a 1\n"
        time.sleep(0.1)
        crcli.move(program.pid)
        with unix_client(path) as client:
            client.sendall(b"b\n")
            assert client.recv(100) == b"b 2\n"


def test_a_unix_client_outside_sees_its_connection_closed(crcli: Crcli, tmp_path: Path) -> None:
    """A dump is not refused because of a connected unix client; client and server can meet again."""
    path = tmp_path / "socket"
    family = f"socket(socket.AF_UNIX); listener.bind({str(path)!r}); listener.listen()"
    with spawn_python(SERVER.format(family=family)) as program:
        with unix_client(path) as client:
            client.sendall(b"a\n")
            assert client.recv(100) == b"a 1\n"
            report = crcli.dump(program.pid)
            assert "unix-outside" in {finding["name"] for finding in report["findings"]}
            assert client.recv(100) == b""
        crcli.restore(report["image"])
        with unix_client(path) as client:
            client.sendall(b"b\n")
            assert client.recv(100) == b"b 2\n"


def test_a_unix_connection_to_a_service_outside_is_made_again(crcli: Crcli, tmp_path: Path) -> None:
    """A client of a unix service outside finds itself connected to the same path after the restore."""
    path = str(tmp_path / "service")
    with (
        unix_service(path) as service,
        spawn_python(
            f"""
            import socket, time
            peer = socket.socket(socket.AF_UNIX)
            peer.connect({path!r})
            print("ready")
            for number in range(10**6):
                peer.sendall(b"%d\\n" % number)
                time.sleep(0.01)
            """
        ) as program,
    ):
        first = service.accept()[0]
        image = crcli.dump(program.pid)["image"]
        first.close()
        crcli.restore(image)
        second = service.accept()[0]
        second.settimeout(10)
        assert int(second.makefile("rb").readline()) > 0
        second.close()


def test_a_unix_connection_that_an_event_loop_waits_for(crcli: Crcli, tmp_path: Path) -> None:
    """An event loop with a connection to a service outside goes on, and has another connection to it."""
    path = str(tmp_path / "service")
    with unix_service(path) as service:
        code = f"""
            import asyncio
            async def talk():
                reader, writer = await asyncio.open_unix_connection({path!r})
                print("ready")
                while line := await reader.readline():
                    writer.write(line)
            asyncio.run(talk())
            """
        with spawn_python(code) as program:
            first = service.accept()[0]
            image = crcli.dump(program.pid)["image"]
            first.close()
            crcli.restore(image)
            with service.accept()[0] as second:
                second.settimeout(10)
                second.sendall(b"here\n")
                assert second.recv(100) == b"here\n"


@contextmanager
def unix_service(path: str) -> Iterator[socket.socket]:
    """What listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(path)
        service.listen()
        service.settimeout(10)
        yield service


@contextmanager
def unix_client(path: Path) -> Iterator[socket.socket]:
    """A connection to a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        yield client

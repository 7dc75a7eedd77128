"""Nodes made of namespaces: a tenth of a second each, on this host's kernel and processor.

A node has processes, mounts, an address, a name and System V objects of its own, and a writable layer in
memory over this host's root. Nodes of one `Lan` reach each other and whoever made it, and nothing else.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crcli import kernel
from crcli.criu.binary import criu_command
from tests.support.faults import network_of_our_own
from tests.support.nodes.base import ROOT, Done, Node, NodeFailed

OUTSIDE = "10.77.0.1"
"""The address of whoever made the network, where the store listens."""

_HIDDEN = ("/tmp", "/run", "/dev/shm")


def why_not() -> str:
    """What this host lacks for namespace nodes; empty when it lacks nothing."""
    if os.getuid() != 0:
        return "needs root"
    lacking = next((name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None), "")
    return f"no {lacking}" if lacking else ""


class NamespaceNode(Node):
    """A node of namespaces, joined to a bridge of this thread's network."""

    def __init__(self, name: str, number: int, folder: str) -> None:
        super().__init__(name)
        self.address = f"10.77.0.{number}"
        self._port = f"port-{number}"
        self.init_pid = 0
        self._killed = False
        self._ending = threading.Lock()
        command = ("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
        first = (sys.executable, "-S", str(Path(__file__).with_name("init.py")))
        self._keeper = subprocess.Popen(
            [*command, *first, folder, name, str(number * 1000), *_binds()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where unshare complains when its child is killed
            start_new_session=True,
            preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
        )
        assert self._keeper.stdout is not None
        with self._keeper.stdout as said:
            ready = said.readline() == b"ready\n"
        if not ready:
            self.kill()
            raise NodeFailed(f"{name} does not start")
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children").read_text()
        self.init_pid = int(children)
        _ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self.init_pid))
        _ip("link", "set", self._port, "master", "lan", "up")
        self.take_address(self.address)

    @property
    def root(self) -> Path:
        """Its root, as this process can look into it."""
        return Path(f"/proc/{self.init_pid}/root")

    def execute(self, command: str, limit_s: float) -> Done:
        """See Node."""
        process = self._enter(command)
        try:
            out, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as late:
            process.kill()
            raise NodeFailed(f"{self.name}: no end within {limit_s} s: {command}\n{late.output!r}") from None
        return Done(process.returncode, out)

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command; it ends with the node at the latest. Its output is in the stream's hands."""
        return self._enter(command)

    def take_address(self, address: str) -> None:
        """Give it an address (one more), and tell everybody on the network where that is now."""
        self.execute(f"ip addr add {address}/24 dev eth0 && ip link set eth0 up", 10)
        self.execute(f"{sys.executable} -S -c '{_ANNOUNCE}' {address}", 10)

    def cut(self) -> None:
        """See Node."""
        _ip("link", "set", self._port, "down")

    def mend(self) -> None:
        """See Node."""
        _ip("link", "set", self._port, "up")

    def is_alive(self) -> bool:
        """Whether nobody has begun to kill it: what runs there may end before the one who kills is done."""
        return not self._killed and self._keeper.poll() is None

    def kill(self) -> None:
        """See Node: the kernel ends what is in a pid namespace with its first process, which it does last."""
        self._killed = True
        with self._ending:
            if self._keeper.poll() is not None:
                return
            first = os.pidfd_open(self.init_pid) if self.init_pid else -1
            self._keeper.kill()
            self._keeper.wait()
            if first >= 0:
                select.select([first], [], [], 10)
                os.close(first)

    def command_there(self) -> list[str]:
        """What runs there the line of the shell that is added to it, in its environment."""
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"]
        enter = ["nsenter", "--target", str(self.init_pid), *spaces]
        variables = [f"{key}={value}" for key, value in self.variables().items()]
        return [*enter, "env", "-i", *variables, "setsid", "--wait", "sh", "-c"]

    def _enter(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command_there(), command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Lan:
    """A bridge that nodes are joined to."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._count = 0
        # With an address of its own the bridge keeps it: else it has that of one of its ports, and when that
        # node dies the others send to where nobody is.
        _ip("link", "add", "lan", "address", "02:00:00:00:00:01", "type", "bridge")
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", "lan")
        _ip("link", "set", "lan", "up")

    def node(self, name: str) -> NamespaceNode:
        """A new node; it ends with the network, or with the block of `only_for_now`."""
        self._count = self._count % 90 + 2
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="crcli-node-"))
        node = NamespaceNode(name, self._count, folder)
        self._stack.callback(node.kill)
        return node

    @contextmanager
    def only_for_now(self) -> Iterator[None]:
        """Nodes that are made in the block end with it."""
        before, self._stack = self._stack, ExitStack()
        try:
            with self._stack:
                yield
        finally:
            self._stack = before


@contextmanager
def lan() -> Iterator[Lan]:
    """A network of its own for this thread, what it starts, and its nodes; all of it ends with the block."""
    with network_of_our_own(), ExitStack() as stack:
        yield Lan(stack)


def _binds() -> list[str]:
    """Folders that the tests need and that the root of a node would not show: other mounts, or hidden."""
    root = os.stat("/").st_dev
    criu = Path(criu_command()[-1]).parents[2]
    needed = [str(ROOT), sys.prefix, sys.base_prefix, str(criu)]
    return [path for path in needed if os.stat(path).st_dev != root or path.startswith(_HIDDEN)]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


_ANNOUNCE = """
import socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("eth0", 0x806))
ours, everybody, address = wire.getsockname()[4], bytes([255] * 6), socket.inet_aton(sys.argv[1])
wire.send(everybody + ours + bytes.fromhex("0806000108000604" "0001") + ours + address + everybody + address)
"""
"""A gratuitous ARP request, as whoever takes over an address sends it."""

"""Sockets by inode: what they are, where they lead, who is at the other end.

The kernel answers over NETLINK_SOCK_DIAG what /proc/PID/net/* only half says: the peer of a unix socket. The
structures are those of linux/inet_diag.h and linux/unix_diag.h. A network namespace other than ours is asked
through a socket opened inside it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from crcli import kernel
from crcli.records import Struct

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP = 1, 0x300
UDIAG_SHOW_NAME, UDIAG_SHOW_PEER, UDIAG_SHOW_ICONS, UDIAG_SHOW_RQLEN = 1, 4, 8, 16
UNIX_DIAG_NAME, UNIX_DIAG_PEER, UNIX_DIAG_ICONS, UNIX_DIAG_RQLEN = 0, 2, 3, 4

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_INET_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2: family, protocol, extensions, states, id
_INET_ANSWER = struct.Struct("=BBBBHH16s16sI8xIIIII")
_PORTS = struct.Struct("!HH")
_UNIX_REQUEST = struct.Struct("=BBHIII8x")  # unix_diag_req: family, protocol, pad, states, ino, show, cookie
_UNIX_ANSWER = struct.Struct("=BBBBI8x")  # unix_diag_msg: family, type, state, pad, ino, cookie
_ATTRIBUTE = struct.Struct("=HH")

_TYPES = {1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket"}

_KNOWN_PROTOCOLS = {
    "TCP": ("inet", "tcp", "stream"),
    "TCPv6": ("inet6", "tcp", "stream"),
    "UDP": ("inet", "udp", "dgram"),
    "UDPv6": ("inet6", "udp", "dgram"),
    "UNIX-STREAM": ("unix", "unix", "stream"),
    "UNIX": ("unix", "unix", "dgram"),
}


class State(StrEnum):
    """The states of include/net/tcp_states.h; unix and UDP sockets use a few of them."""

    ESTABLISHED = "established"
    SYN_SENT = "syn-sent"
    SYN_RECV = "syn-recv"
    FIN_WAIT1 = "fin-wait-1"
    FIN_WAIT2 = "fin-wait-2"
    TIME_WAIT = "time-wait"
    CLOSE = "close"
    CLOSE_WAIT = "close-wait"
    LAST_ACK = "last-ack"
    LISTEN = "listen"
    CLOSING = "closing"
    NEW_SYN_RECV = "new-syn-recv"


_STATES = dict(enumerate(State, start=1))
_TIME_WAIT = next(number for number, state in _STATES.items() if state is State.TIME_WAIT)
_OPEN_STATES = 0xFFFFFFFF & ~(1 << _TIME_WAIT)
"""All but the connections that only wait for their time to pass: nobody has them open, and a host that talks
much has thousands of them."""

CONNECTED = frozenset(State) - {State.CLOSE, State.LISTEN, State.TIME_WAIT, State.NEW_SYN_RECV}


class Address(NamedTuple):
    """One end of a connection. An IPv4 address that travels in IPv6 (::ffff:1.2.3.4) is written as IPv4."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


NOWHERE = Address("", 0)


class Socket(Struct, frozen=True):
    """One socket of a network namespace.

    `protocol` is `tcp`, `udp`, `unix` or, for what the kernel lists nowhere, its own name for it (`NETLINK`,
    `MPTCP`…); `family` is `inet`, `inet6`, `unix`, or empty where `protocol` says it all. `queued` is what
    waits to be read, in bytes; for a listener, the connections that nobody has accepted; `unsent` is what the
    other side has not taken. `peer` is the inode of a unix socket's other end (0: none), `path` a unix
    socket's name, with '@' for the abstract ones, `waiting` the inodes of those that a unix listener has not
    accepted yet (0: closed again).
    """

    inode: int
    family: str
    protocol: str
    type: str
    state: State
    local: Address = NOWHERE
    remote: Address = NOWHERE
    queued: int = 0
    unsent: int = 0
    peer: int = 0
    path: str = ""
    waiting: tuple[int, ...] = ()

    @property
    def connected(self) -> bool:
        """Whether there is another end: established, or on the way to or from it."""
        return self.state in CONNECTED

    @property
    def endpoints(self) -> tuple[Address, Address]:
        """Both ends; the other end's socket has them mirrored."""
        return self.local, self.remote


def sockets_of(pid: int, *, same_netns: bool) -> dict[int, Socket]:
    """Return the TCP, UDP and unix sockets of a process's network namespace that somebody has open, by inode.

    A connection that nobody has accepted yet has no inode, and so is left out.
    """
    try:
        with _diag_socket(pid, same_netns=same_netns) as diag:
            found = list(_ask(diag))
    except OSError:
        found = list(_read_proc_net(pid))
    return {one.inode: one for one in found if one.inode}


def unlisted_socket(inode: int, pid: int, fd: int) -> Socket:
    """Return a socket that no list has: neither bound nor connected, or of another family.

    The kernel tells its protocol through an extended attribute, as lsof asks for it.
    """
    try:
        name = os.getxattr(f"/proc/{pid}/fd/{fd}", "system.sockprotoname").rstrip(b"\0").decode()
    except OSError:
        name = ""
    family, protocol, kind = _KNOWN_PROTOCOLS.get(name, ("", name, ""))
    return Socket(inode, family, protocol, kind, State.CLOSE)


def unread_netlink(pid: int) -> frozenset[int]:
    """Return the inodes of the netlink sockets of a process's network namespace with unread messages."""
    fields = (line.split() for line in _lines(pid, "netlink"))
    return frozenset(int(words[9]) for words in fields if words[4] != "0")


def _diag_socket(pid: int, *, same_netns: bool) -> socket.socket:
    return _diag_socket_here() if same_netns else _diag_socket_inside(pid)


def _diag_socket_here() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)


def _diag_socket_inside(pid: int) -> socket.socket:
    """Open the socket in the process's network namespace."""
    opened: list[socket.socket] = []
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.in_network(network, lambda: opened.append(_diag_socket_here()))
    finally:
        os.close(network)
    return opened[0]


def _ask(diag: socket.socket) -> Iterator[Socket]:
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            request = _INET_REQUEST.pack(family, protocol, 0, _OPEN_STATES)
            for body in _dump(diag, request):
                yield _inet(body, protocol)
    show = UDIAG_SHOW_NAME | UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN
    for body in _dump(diag, _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show)):
        yield _unix(body)


def _dump(diag: socket.socket, request: bytes) -> Iterator[bytes]:
    """Send one dump request and yield the bodies of its answers; OSError for what the kernel refuses."""
    head = _HEADER.pack(_HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    diag.send(head + request)
    while True:
        answer = memoryview(diag.recv(1 << 16))
        while len(answer) >= _HEADER.size:
            length, kind, *_ = _HEADER.unpack_from(answer)
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
                raise OSError(code, os.strerror(code))
            yield bytes(answer[_HEADER.size : length])
            answer = answer[(length + 3) & ~3 :]


def _inet(body: bytes, protocol: int) -> Socket:
    answer = _INET_ANSWER.unpack_from(body)
    family, state, _, _, _, _, source, destination, _, _, queued, unsent, _, inode = answer
    local_port, remote_port = _PORTS.unpack_from(body, 4)
    tcp = protocol == socket.IPPROTO_TCP
    return Socket(
        inode=inode,
        family="inet" if family == socket.AF_INET else "inet6",
        protocol="tcp" if tcp else "udp",
        type="stream" if tcp else "dgram",
        state=_STATES[state],
        local=_address(family, source, local_port),
        remote=_address(family, destination, remote_port),
        queued=queued,
        unsent=unsent,
    )


def _address(family: int, raw: bytes, port: int) -> Address:
    if family == socket.AF_INET:
        return Address(socket.inet_ntop(socket.AF_INET, raw[:4]), port)
    if raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return Address(socket.inet_ntop(socket.AF_INET, raw[12:]), port)
    return Address(socket.inet_ntop(socket.AF_INET6, raw), port)


def _unix(body: bytes) -> Socket:
    _, kind, state, _, inode = _UNIX_ANSWER.unpack_from(body)
    peer, path, queued, unsent = 0, "", 0, 0
    waiting: tuple[int, ...] = ()
    for attribute, value in _attributes(body[_UNIX_ANSWER.size :]):
        if attribute == UNIX_DIAG_NAME:
            path = _unix_path(value)
        elif attribute == UNIX_DIAG_PEER:
            (peer,) = struct.unpack("=I", value)
        elif attribute == UNIX_DIAG_RQLEN:
            queued, unsent = struct.unpack_from("=II", value)
        elif attribute == UNIX_DIAG_ICONS:
            waiting = struct.unpack(f"={len(value) // 4}I", value)
    return Socket(
        inode=inode,
        family="unix",
        protocol="unix",
        type=_TYPES.get(kind, str(kind)),
        state=_STATES[state],
        queued=queued,
        unsent=unsent,
        peer=peer,
        path=path,
        waiting=waiting,
    )


def _attributes(raw: bytes) -> Iterator[tuple[int, bytes]]:
    while len(raw) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(raw)
        if length < _ATTRIBUTE.size:
            return
        yield kind, raw[_ATTRIBUTE.size : length]
        raw = raw[(length + 3) & ~3 :]


def _unix_path(raw: bytes) -> str:
    if raw.startswith(b"\0"):
        return "@" + os.fsdecode(raw[1:])
    return os.fsdecode(raw.rstrip(b"\0"))


def _read_proc_net(pid: int) -> Iterator[Socket]:
    """Yield what /proc/PID/net/* says; peers of unix sockets are not in it."""
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in _lines(pid, protocol):
            yield _inet_line(line.split(), protocol)
    for line in _lines(pid, "unix"):
        yield _unix_line(line.split(None, 7))


def _lines(pid: int, name: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/net/{name}", encoding="utf-8", errors="surrogateescape") as file:
            return file.readlines()[1:]
    except OSError:
        return []


def _inet_line(words: list[str], protocol: str) -> Socket:
    tcp = protocol.startswith("tcp")
    family = socket.AF_INET6 if protocol.endswith("6") else socket.AF_INET
    return Socket(
        inode=int(words[9]),
        family="inet6" if family == socket.AF_INET6 else "inet",
        protocol="tcp" if tcp else "udp",
        type="stream" if tcp else "dgram",
        state=_STATES[int(words[3], 16)],
        local=_hex_address(family, words[1]),
        remote=_hex_address(family, words[2]),
        queued=int(words[4].partition(":")[2], 16),
    )


def _hex_address(family: int, text: str) -> Address:
    """Parse `0100007F:1F90`: 32-bit words in the host's byte order, then the port."""
    host, _, port = text.partition(":")
    words = (int(host[at : at + 8], 16) for at in range(0, len(host), 8))
    raw = b"".join(struct.pack("=I", word) for word in words)
    return _address(family, raw, int(port, 16))


def _unix_line(words: list[str]) -> Socket:
    """Parse `Num: RefCount Protocol Flags Type St Inode Path`; its states are SS_*, 3 is connected."""
    listening = int(words[3], 16) & 0x10000
    connected = int(words[5], 16) == 3
    return Socket(
        inode=int(words[6]),
        family="unix",
        protocol="unix",
        type=_TYPES.get(int(words[4], 16), words[4]),
        state=State.LISTEN if listening else State.ESTABLISHED if connected else State.CLOSE,
        path=words[7].strip() if len(words) > 7 else "",
    )

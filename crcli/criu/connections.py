"""TCP and UDP sockets in CRIU's images, edited for the place in which they are restored."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import ImageFile, read_files
from crcli.criu.inspect import inet_socket
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from crcli.criu.needs import InetSocket
    from crcli.criu.workspace import Workspace

_TCP, _UDP = 6, 17
_PROTOCOLS = {_TCP: "tcp", _UDP: "udp"}
_TCP_CLOSE, _TCP_LISTEN = 7, 10
_ESTABLISHED_STATES = frozenset((1, 2, 3, 4, 5, 6, 8, 9, 11))
_NO_NETWORK_LOCK = 2


def has_connections(images: Workspace) -> bool:
    """Whether the tree has TCP connections: with somebody outside, or inside of it."""
    return any(
        entry.isk.proto == _TCP and entry.isk.state in _ESTABLISHED_STATES
        for entry in read_files(images).entries
        if entry.type == messages.fd_types.INETSK
    )


def close_outside_connections(images: Workspace, here: Collection[tuple[str, str]]) -> None:
    """Turn established TCP connections whose other end is lost into closed sockets.

    Connections inside the tree stay as they are, and so do those whose other end is a socket of this host
    that still waits, and does not talk to the original: `here` are the (local, remote) ends of all its
    connections, as "address:port". The program sees ECONNRESET or EOF on its next use, and reconnects.
    """
    files = read_files(images)
    sockets = [entry.isk for entry in files.entries if entry.type == messages.fd_types.INETSK]
    sockets = [sock for sock in sockets if sock.proto == _TCP]
    ends = {(_address(s.src_addr, s.src_port), _address(s.dst_addr, s.dst_port)) for s in sockets}
    is_changed = False
    for sock in sockets:
        if sock.state not in _ESTABLISHED_STATES:
            continue
        local, remote = _address(sock.src_addr, sock.src_port), _address(sock.dst_addr, sock.dst_port)
        mine, theirs = (_text(local), _text(remote)), (_text(remote), _text(local))
        if (remote, local) in ends or (theirs in here and mine not in here):
            continue
        sock.src_port = sock.dst_port = 0
        sock.state = _TCP_CLOSE
        is_changed = True
    if is_changed:
        images.write("files.img", files.encode())


class BoundSocket(Struct, frozen=True):
    """A TCP or UDP socket of the image with a port and no other end: it listens, or could.

    `protocol` is tcp or udp, `host` an address as text. `only_v6`: an IPv6 socket that takes no IPv4.
    """

    protocol: str
    host: str
    port: int
    only_v6: bool

    @property
    def is_open_to_all(self) -> bool:
        """Whether it listens on every address."""
        return self.host in ("0.0.0.0", "::")


def bound_sockets(images: Workspace) -> list[BoundSocket]:
    """The sockets of the image that wait at a port, each as often as there are sockets."""
    return [_bound(sock) for sock in _inet_sockets(read_files(images)) if _waits_at_a_port(sock)]


def move_ports(images: Workspace, ports: Mapping[int, int]) -> None:
    """Have sockets that wait at a port of `ports` wait at its new one, and what is connected to them inside.

    Connections whose other end is in the tree too get the new port at both ends, so that they stay unique
    where another tree has the same. Those to outside keep theirs: the other side knows no other.
    """
    files = read_files(images)
    sockets = _inet_sockets(files)
    moved = [_bound(sock) for sock in sockets if _waits_at_a_port(sock) and sock.src_port in ports]
    ends = {(sock.proto, *_ends(sock)) for sock in sockets}

    def moves(protocol: int, host: bytes, port: int) -> bool:
        where = _text((host, port)).rpartition(":")[0].strip("[]")
        return any(
            (one.protocol, one.port) == (_PROTOCOLS[protocol], port)
            and (one.host == where or one.is_open_to_all)
            for one in moved
        )

    for sock in sockets:
        local, remote = _ends(sock)
        alone, inside = _waits_at_a_port(sock), (sock.proto, remote, local) in ends
        if (alone or inside or sock.proto == _UDP) and moves(sock.proto, *local):
            sock.src_port = ports[local[1]]
        to_itself = inside or (sock.proto == _UDP and _is_local(remote[0], ends))
        if to_itself and moves(sock.proto, *remote):
            sock.dst_port = ports[remote[1]]
    images.write("files.img", files.encode())


def free_lost_addresses(images: Workspace, is_here: Callable[[InetSocket], bool]) -> None:
    """Let UDP sockets that are connected to outside send from an address of this host.

    Theirs was the old host's, and the kernel's choice. `is_here` says whether a socket's address is ours.
    """
    files = read_files(images)
    entries = [sock for sock in _inet_sockets(files) if sock.src_port]
    sockets = [inet_socket(sock) for sock in entries]
    lost = [
        sock
        for sock, one in zip(entries, sockets, strict=True)
        if one.may_have_another_address(sockets) and not is_here(one)
    ]
    for sock in lost:
        sock.src_addr[:] = [0] * len(sock.src_addr)
    if lost:
        images.write("files.img", files.encode())


def forget_devices(images: Workspace) -> None:
    """Bind no socket to a network interface, for a network that has none."""
    files = read_files(images)
    bound = [e.isk for e in files.entries if e.type == messages.fd_types.INETSK]
    bound = [sock for sock in bound if sock.opts.so_bound_dev]
    for sock in bound:
        sock.opts.ClearField("so_bound_dev")
    if bound:
        images.write("files.img", files.encode())


def mend_connections(images: Workspace) -> None:
    """Put right what keeps CRIU from restoring a busy TCP connection.

    A window update may lie beyond what the kernel accepts back: about one dump in a hundred records a
    `snd_wl1` past `rcv_nxt + rcv_wnd`, and restoring it fails with "Unable to set window parameters". The
    value only says how fresh the window is: the last sequence received is as good.

    Data that was not sent yet CRIU really sends while it restores. Where the other end is restored a moment
    later, and no filter holds the packets back, the answer is a reset (EPIPE). So all data counts as sent and
    not acknowledged: the kernel sends it again by itself.
    """
    for name in images.names():
        if not name.startswith("tcp-stream-"):
            continue
        data = images.read(name)
        (size,) = struct.unpack_from("<I", data, 8)
        entry = messages.tcp_stream_entry.FromString(data[12 : 12 + size])
        beyond = (entry.snd_wl1 - entry.inq_seq - entry.rcv_wnd) & 0xFFFF_FFFF
        if entry.HasField("snd_wl1") and 0 < beyond < 1 << 31:
            entry.snd_wl1 = entry.inq_seq
        entry.unsq_len = 0
        body = entry.SerializeToString()
        images.write(name, data[:8] + struct.pack("<I", len(body)) + body + data[12 + size :])


def forget_network_lock(images: Workspace) -> None:
    """Let CRIU look for no packet filter table where there is none: to find none takes the kernel 10 ms.

    A tree that brings its network namespace along is left as it is: CRIU locks that one anew while it works.
    """
    if any(name.startswith("netns-") for name in images.names()):
        return
    inventory = ImageFile.parse(images.read("inventory.img"), messages.inventory_entry)
    inventory.entries[0].network_lock_method = _NO_NETWORK_LOCK
    images.write("inventory.img", inventory.encode())


def _inet_sockets(files: ImageFile) -> list[Any]:
    return [e.isk for e in files.entries if e.type == messages.fd_types.INETSK and e.isk.proto in _PROTOCOLS]


def _waits_at_a_port(sock: Any) -> bool:
    """Whether it is bound and has no other end; a TCP socket may be about to listen, or does."""
    is_free = sock.proto == _UDP or sock.state in (_TCP_LISTEN, _TCP_CLOSE)
    return bool(is_free and sock.src_port and not sock.dst_port)


def _bound(sock: Any) -> BoundSocket:
    host, _, port = _text(_address(sock.src_addr, sock.src_port)).rpartition(":")
    return BoundSocket(_PROTOCOLS[sock.proto], host.strip("[]"), int(port), bool(sock.v6only))


def _is_local(host: bytes, ends: Iterable[tuple[int, tuple[bytes, int], tuple[bytes, int]]]) -> bool:
    """Whether an address is of the host that the tree was on, as far as the image tells."""
    return host[:1] == b"\x7f" or host == bytes(15) + b"\1" or any(host == local[0] for _, local, _ in ends)


def _ends(sock: Any) -> tuple[tuple[bytes, int], tuple[bytes, int]]:
    return _address(sock.src_addr, sock.src_port), _address(sock.dst_addr, sock.dst_port)


def _address(words: Iterable[int], port: int) -> tuple[bytes, int]:
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    if len(raw) == 16 and raw.startswith(bytes(10) + b"\xff\xff"):
        raw = raw[12:]  # an IPv4 address in IPv6 clothes: the peer may wear none
    return raw, port


def _text(address: tuple[bytes, int]) -> str:
    from ipaddress import ip_address

    raw, port = address
    host = str(ip_address(raw)) if len(raw) in (4, 16) else raw.hex()
    return f"[{host}]:{port}" if len(raw) == 16 else f"{host}:{port}"

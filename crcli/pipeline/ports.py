"""Ports that a tree is to listen on instead of its own (`restore --port`): checked here, then changed."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from crcli.criu.connections import bound_sockets, move_ports
from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crcli.criu.connections import BoundSocket
    from crcli.criu.workspace import Workspace


def remap_ports(images: Workspace, ports: Mapping[int, int]) -> None:
    """Have the image's sockets wait at other ports: `ports` maps old ones to new ones.

    Raises GuardRefused, with the images unchanged, when nothing waits at an old port, or a new one is taken:
    by the image itself, or on this host.
    """
    waiting = bound_sockets(images)
    for old in ports:
        if not any(one.port == old for one in waiting):
            raise _nobody_listens(old, waiting)
    moved = [one for one in waiting if one.port in ports]
    stay = [one for one in waiting if one.port not in ports]
    for one in moved:
        if any(_collide(one, ports[one.port], other) for other in stay):
            raise _taken(one, ports[one.port], "the tree itself listens there")
    if not any(name.startswith("netns-") for name in images.names()):  # else it brings its ports along
        for one in dict.fromkeys(moved):
            if _is_taken_here(one, ports[one.port]):
                raise _taken(one, ports[one.port], "another process has it on this host")
    move_ports(images, ports)


def _collide(one: BoundSocket, port: int, other: BoundSocket) -> bool:
    """Whether a socket, moved to a port, would wait where another of the tree does."""
    hosts_meet = one.host == other.host or one.is_open_to_all or other.is_open_to_all
    return (one.protocol, port) == (other.protocol, other.port) and hosts_meet


def _is_taken_here(one: BoundSocket, port: int) -> bool:
    """Whether a socket like this one could not be bound to the port: asked of the kernel.

    Connections on their way out (TIME_WAIT) keep nobody from a TCP port. An address that this host does not
    have is another matter.
    """
    family = socket.AF_INET6 if ":" in one.host else socket.AF_INET
    kind = socket.SOCK_STREAM if one.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(family, kind) as trial:
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, one.only_v6)
            if one.protocol == "tcp":
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((one.host, port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _nobody_listens(old: int, waiting: Iterable[BoundSocket]) -> GuardRefused:
    there = sorted({(one.protocol, one.port) for one in waiting})
    listed = ", ".join(f"{port} ({protocol})" for protocol, port in there) or "none"
    return GuardRefused(
        f"nothing in the image listens on port {old}",
        hint=f"ports that the image's sockets wait at: {listed}",
        findings=[
            Finding(
                "port-not-in-image",
                Severity.BLOCKER,
                f"nothing in the image listens on port {old}",
                {"port": old, "there": [f"{port}/{protocol}" for protocol, port in there]},
                action="nothing was started",
                remedy="name one of the ports that it listens on, or leave --port out",
            )
        ],
    )


def _taken(one: BoundSocket, port: int, why: str) -> GuardRefused:
    message = f"{one.protocol} port {one.port} cannot become {port}: {why}"
    return GuardRefused(
        message,
        hint="choose another port",
        findings=[
            Finding(
                "port-taken",
                Severity.BLOCKER,
                message,
                {"protocol": one.protocol, "host": one.host, "port": port, "instead_of": one.port},
                action="nothing was started",
                remedy="choose another port",
            )
        ],
    )

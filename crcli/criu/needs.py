"""What an image needs of a host, as CRIU will look for it: the types that `inspect` reads from its images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Collection


class OpenedFile(Struct, frozen=True):
    """A file or folder that CRIU opens by its path, with what CRIU compares: None where it has no record.

    `size` in bytes, `mode` with the file type, `build_id` in hexadecimal (empty: it has none). `mapped`: some
    process has it in its memory, or executes it. `writes`: the tree writes to it other than at its end.
    `appends`: all that the tree can do is add to its end, so that its size does not matter to CRIU.
    """

    path: str
    size: int | None
    mode: int | None
    build_id: str
    mapped: bool = True
    writes: bool = False
    appends: bool = False


class InetSocket(Struct, frozen=True):
    """A TCP or UDP socket with a local port. `state` is `listening`, `bound` or `connected`.

    `reuse_address` and `reuse_port` are what the program itself had asked for.
    """

    protocol: str
    family: int
    host: str
    port: int
    remote: tuple[str, int]
    state: str
    reuse_address: bool = False
    reuse_port: bool = False
    only_v6: bool = False
    free_bind: bool = False
    device: str = ""

    def may_have_another_address(self, others: Collection[InetSocket]) -> bool:
        """Whether it may send from any address: UDP that is connected, and not with one of these `others`."""
        ends = (self.host, self.port)
        is_client = self.protocol == "udp" and self.state == "connected" and not self.device
        return is_client and not any(one.protocol == "udp" and one.remote == ends for one in others)


class LockedFile(Struct, frozen=True):
    """A lock that the tree has on a file, and that CRIU takes again: flock(2)'s, which is of the whole, or
    fcntl(2)'s on a range (length 0: to the end). `exclusive`: nobody else may have one."""

    path: str
    whole: bool
    exclusive: bool
    start: int = 0
    length: int = 0


class Rights(Struct, frozen=True):
    """Whom the tree's processes belong to, and which capabilities they hold or pass on (a bit for each)."""

    users: frozenset[int]
    groups: frozenset[int]
    capabilities: int

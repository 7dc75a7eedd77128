"""What the kernel writes in /proc is read right, also where it is awkward."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from crcli.gpu.saved import ordinary_memory
from crcli.process import sockets
from crcli.process.asking import device_of_tty_nr
from crcli.process.files import Kind, Lock, Mount, OpenFile, _mount, is_tty, mappings, mounts, open_files
from crcli.process.gather import _pts_index
from crcli.process.identity import ProcessId, identify, parse_stat
from crcli.process.maps import areas, flagged_areas, parse_maps
from crcli.process.sockets import Address, State

STAT = (
    b"4711 (%s) S 1 4712 4713 34816 4714 4194304 100 0 0 0 0 0 0 0 20 0 3 0 117420 3133440 374 "
    b"18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 1 1 1 1 1 1 1 0\n"
)


@pytest.mark.parametrize(
    "comm", [b"sleep", b"a) S 1 (b", b"tmux: server", b")", b"", b"\xff\xfe", b"two\nlines"]
)
def test_command_names_may_hold_anything(comm: bytes) -> None:
    """A stat record is read right whatever the command name holds."""
    stat = parse_stat(STAT % comm)
    assert (stat.pid, stat.state, stat.ppid, stat.pgid, stat.sid) == (4711, "S", 1, 4712, 4713)
    assert (stat.threads, stat.start_time) == (3, 117420)
    assert os.fsencode(stat.comm) == comm


def test_a_process_is_its_pid_and_its_start() -> None:
    """The same pid with another start time is another process."""
    me = identify(os.getpid())
    assert me.alive()
    assert not ProcessId(me.pid, me.start_time + 1).alive()


def test_a_signal_is_for_the_very_process() -> None:
    """Who took its pid over gets none, nor has who ended."""
    child = subprocess.Popen(["sleep", "1000"])
    try:
        there = identify(child.pid)
        assert not ProcessId(there.pid, there.start_time + 1).send(signal.SIGKILL)
        assert child.poll() is None and there.send(signal.SIGTERM)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not there.send(signal.SIGTERM)  # a zombie
        assert child.wait() == -signal.SIGTERM
        assert not there.send(signal.SIGTERM)
    finally:
        child.kill()
        child.wait()


def test_nobody_is_not_alive() -> None:
    """A pid that nobody has is no process."""
    with pytest.raises(ProcessLookupError):
        identify(1 << 22)
    assert not ProcessId(1 << 22, 1).alive()


def test_a_zombie_is_not_alive() -> None:
    """A process that has ended and was not reaped is not alive any more."""
    child = os.fork()
    if not child:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert not identify(child).alive()
    finally:
        os.waitpid(child, 0)


def test_open_files_name_kind_flags_and_position(tmp_path) -> None:
    """Each kind of descriptor of this very process is told apart, with its flags and position."""
    path = tmp_path / "log"
    with path.open("ab") as log, socket.socket() as listener:
        log.write(b"line")
        log.flush()
        reader, writer = os.pipe()
        try:
            found = {file.fd: file for file in open_files(os.getpid())}
        finally:
            os.close(reader)
            os.close(writer)
        file = found[log.fileno()]
        assert (file.kind, file.path, file.pos, file.size) == (Kind.REGULAR, str(path), 4, 4)
        assert file.writable and file.flags & os.O_APPEND and not file.readable
        assert found[listener.fileno()].kind is Kind.SOCKET
        assert found[reader].kind is Kind.PIPE and found[reader].readable and not found[reader].writable


def test_anonymous_shared_memory_is_no_deleted_file() -> None:
    """Shared memory opened through map_files reads `/dev/zero (deleted)`, and is memory all the same."""
    with mmap.mmap(-1, 4096) as memory:
        memory[0] = 1
        address = next(one.address for one in mappings(os.getpid()) if one.is_anonymous_shared)
        try:
            fd = os.open(f"/proc/self/map_files/{address}", os.O_RDWR)
        except PermissionError:
            pytest.skip("map_files needs CAP_CHECKPOINT_RESTORE")
        found = {file.fd: file for file in open_files(os.getpid())}
        os.close(fd)
    assert found[fd].kind is Kind.MEMFD


def test_a_file_whose_name_ends_like_a_deleted_one_is_not_deleted(tmp_path) -> None:
    """Only a file that has lost its path is deleted, not one that is called so."""
    odd, gone = tmp_path / "odd (deleted)", tmp_path / "gone"
    with odd.open("w"), gone.open("w"):
        gone.unlink()
        found = {file.path: file for file in open_files(os.getpid())}
    assert not found[str(odd)].deleted
    assert found[str(gone)].deleted and found[str(gone)].nlink == 0


def test_locks_are_read_from_fdinfo() -> None:
    """The kernel's own words for locks become records."""
    info = (
        "pos:\t0\nflags:\t02100001\nmnt_id:\t27\nino:\t2146308\n"
        "lock:\t1: FLOCK  ADVISORY  WRITE 6415 fe:00:2146308 0 EOF\n"
        "lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:2146308 10 19\n"
        "lock:\t3: LEASE  ACTIVE    READ  6415 fe:00:2146308 0 EOF\n"
    )
    file = OpenFile(1, 3, "/x", Kind.REGULAR, 0, 0, 27, 0o100644, 0, 1, 2, 1, 0, False, info)
    assert file.locks == (
        Lock("FLOCK", "WRITE", "0", "EOF"),
        Lock("OFDLCK", "READ", "10", "19"),
        Lock("LEASE", "READ", "0", "EOF"),
    )
    assert file.info_field("mnt_id") == "27" and file.info_field("tty-index") is None


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("anon_inode:[io_uring]", "io_uring"),
        ("anon_inode:inotify", "inotify"),
        ("anon_inode:[timerfd]", "timerfd"),
        ("/secretmem (deleted)", "secretmem"),
        ("pidfd:[123]", "pidfd"),
    ],
)
def test_anonymous_inodes_have_one_name(target: str, name: str) -> None:
    """The kernel's several ways to write an anonymous inode come down to its name."""
    deleted = target.endswith("(deleted)")
    file = OpenFile(1, 3, target, Kind.ANON, 0, 0, 1, 0, 0, 1, 2, 1, 0, deleted, "")
    assert file.anon_name == name


def test_mappings_come_one_per_file() -> None:
    """The interpreter's pieces are one record that can be executed and lies where stat says."""
    found = [
        mapping for mapping in mappings(os.getpid()) if mapping.path == os.path.realpath("/proc/self/exe")
    ]
    assert len(found) == 1
    assert found[0].executable and found[0].has_name and found[0].bytes > 0


ODD_NAMES = [
    "line\nfeed",
    "carriage\rreturn",
    "\v\f\x1c",
    "blanks  ",
    "gone (deleted)",
    "\udcff",
    "a 00:00 0 ",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_mapped_file_is_found_whatever_its_name(tmp_path: Path, name: str) -> None:
    """Names may hold anything; whether the file has been deleted is another matter."""
    path = tmp_path / name
    path.write_bytes(bytes(4096))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
        file_id = os.fstat(file.fileno()).st_ino
        for deleted in (False, True):
            (found,) = [one for one in mappings(os.getpid()) if one.ino == file_id]
            assert (found.path, found.deleted, found.bytes) == (str(path), deleted, 4096)
            listed = list(areas(os.getpid()))
            assert all(area.size > 0 and len(area.permissions) == 4 for area in listed)
            assert [one.inode for one in listed if one.path.startswith(str(path))] == [b"%d" % file_id]
            ordinary_memory(os.getpid())
            path.unlink(missing_ok=True)


def test_areas_are_looked_up_by_what_stands_in_their_lines() -> None:
    """Of those that hold something no line is missed, also the first and the last, and none is cut."""
    raw = Path("/proc/self/maps").read_bytes()
    everything = list(parse_maps(raw))
    for part in (raw.split(b"-")[0], b"[stack]", b"p ", b"[nothing]"):
        wanted = [area for area in everything if part in b" ".join(area)]
        assert list(parse_maps(raw, holding=part)) == wanted
    named = [area.name for area in parse_maps(raw, named=True)]
    assert named == [area.name for area in everything if area.name]
    assert all(area.bounds == (area.start, area.start + area.size) for area in everything)


def test_an_area_is_found_by_its_flag() -> None:
    """smaps says of each area what madvise(2) was told."""
    with mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        del first
        found = {area.start for area in flagged_areas(os.getpid(), b"wf")}
        memory.madvise(18)  # MADV_WIPEONFORK
        assert {area.start for area in flagged_areas(os.getpid(), b"wf")} - found == {address}


def test_mounts_are_read_with_their_odd_names() -> None:
    """mountinfo writes blanks as octal, and has optional fields before the dash."""
    line = r"36 27 0:32 / /mnt/a\040b rw,noatime shared:7 master:1 - tmpfs my\134fs rw,size=4k"
    assert _mount(line) == Mount(36, os.makedev(0, 32), "/", "tmpfs", "/mnt/a b", "my\\fs")
    assert os.stat("/proc").st_dev in {mount.dev for mount in mounts(os.getpid())}


@pytest.mark.parametrize(
    ("major", "minor", "terminal"),
    [
        (5, 0, True),
        (5, 2, True),
        (136, 3, True),
        (4, 1, True),
        (1, 3, False),
        (10, 200, False),
        (5, 3, False),
    ],
)
def test_terminals_are_told_by_device_number(major: int, minor: int, terminal: bool) -> None:
    """A character device is a terminal exactly when its number says so."""
    assert is_tty(os.makedev(major, minor)) is terminal


def test_tty_numbers_of_stat_are_those_of_the_device() -> None:
    """The encoding of tty_nr in /proc/PID/stat leads to the same device, beyond 255 terminals too."""
    for index in (0, 3, 255, 256, 70000):
        minor = index
        encoded = minor & 0xFF | 136 << 8 | (minor & ~0xFF) << 12
        assert _pts_index(device_of_tty_nr(encoded)) == index


# --- sockets -----------------------------------------------------------------------------------------------


def test_the_kernel_and_proc_say_the_same_about_sockets(tmp_path) -> None:
    """What NETLINK_SOCK_DIAG answers and what /proc/net shows agree in everything that both tell."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    six = socket.create_server(("::1", 0), family=socket.AF_INET6)
    named = socket.socket(socket.AF_UNIX)
    named.bind(str(tmp_path / "named"))
    named.listen()
    left, right = socket.socketpair()
    mine = [listener, client, accepted, six, named, left, right]
    try:
        asked = sockets.sockets_of(os.getpid(), same_netns=True)
        read = {one.inode: one for one in sockets._read_proc_net(os.getpid())}
        inodes = [os.fstat(one.fileno()).st_ino for one in mine]
    finally:
        for one in mine:
            one.close()
    for inode in inodes:
        got, shown = asked[inode], read[inode]
        assert (got.family, got.protocol, got.type, got.state) == (
            shown.family,
            shown.protocol,
            shown.type,
            shown.state,
        )
        assert (got.local, got.remote, got.path) == (shown.local, shown.remote, shown.path)
    assert asked[inodes[1]].endpoints == asked[inodes[2]].endpoints[::-1]
    assert asked[inodes[5]].peer == inodes[6]
    assert asked[inodes[4]].state is State.LISTEN and asked[inodes[4]].path == str(tmp_path / "named")


def test_an_ipv4_address_inside_ipv6_is_the_same_address() -> None:
    """Both ends of a connection through a dual-stack listener are written alike."""
    mapped = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 1])
    assert sockets._address(socket.AF_INET6, mapped, 80) == Address("127.0.0.1", 80)
    assert str(Address("::1", 80)) == "[::1]:80"


def test_abstract_names_start_with_an_at_sign() -> None:
    """A name without a place in the file system is told from one with, and keeps its inner zeros."""
    assert sockets._unix_path(b"\0hidden\0x") == "@hidden\0x"
    assert sockets._unix_path(b"/run/log\0") == "/run/log"


def test_attributes_are_read_with_their_padding() -> None:
    """Netlink pads each attribute to four bytes."""
    raw = struct.pack("=HH3sxHHI", 7, 0, b"/ab", 8, 2, 99)
    assert list(sockets._attributes(raw)) == [(0, b"/ab"), (2, struct.pack("=I", 99))]


def test_an_unbound_socket_is_still_known() -> None:
    """A socket that no list of the kernel has is known by its protocol."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink, socket.socket() as tcp:
        assert sockets.unlisted_socket(1, os.getpid(), netlink.fileno()).protocol == "NETLINK"
        assert sockets.unlisted_socket(1, os.getpid(), tcp.fileno()).protocol == "tcp"

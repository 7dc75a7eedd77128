"""The few system calls that crcli needs and Python 3.11 does not have.

Each raises OSError with the kernel's errno, as `os` functions do. Numbers are those of x86_64 and aarch64
(equal for every call here, which all came after the tables were unified, except where a name is used).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal as signals
import struct
import time
from array import array
from contextlib import contextmanager
from fcntl import ioctl
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWNET = 0x4000_0000
CLONE_NEWPID = 0x2000_0000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 1 << 18, 1 << 19

_MNT_DETACH = 2

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_SYS_PIDFD_GETFD = 438
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3
_SYS_IOPRIO_GET, _SYS_IOPRIO_SET = (31, 30) if os.uname().machine == "aarch64" else (252, 251)
_IOPRIO_WHO_PROCESS = 1
_SYS_KCMP = 272 if os.uname().machine == "aarch64" else 312
_KCMP_FILE, _KCMP_EPOLL_TFD = 0, 7
KCMP_VM, KCMP_FILES, KCMP_FS = 1, 2, 3
"""What two threads may share: memory, the table of open files, folders with the umask."""
_SIOCUNIXFILE = 0x89E0
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_CLOEXEC_MOUNT = 1

_TIOCGPTPEER, _TIOCGPTN, _TIOCGDEV = 0x5441, 0x80045430, 0x80045432
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIOCSIFFLAGS, _SIOCGIFFLAGS, _IFF_UP = 0x8914, 0x8913, 1
_RTM_NEWROUTE, _NLM_F_REQUEST_CREATE_ACK, _RTA_OIF = 24, 0x405, 4
_RT_TABLE_LOCAL, _RT_SCOPE_HOST, _RTN_LOCAL = 255, 254, 2

_PTRACE_CONT, _PTRACE_DETACH, _PTRACE_SYSCALL = 7, 17, 24
_PTRACE_GETEVENTMSG, _PTRACE_GETREGSET, _PTRACE_SETREGSET = 0x4201, 0x4204, 0x4205
_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_LISTEN = 0x4206, 0x4207, 0x4208
_PTRACE_GETSIGMASK, _PTRACE_SETSIGMASK = 0x420A, 0x420B
_PTRACE_O_TRACESYSGOOD, _PTRACE_O_TRACEEXIT, _PTRACE_EVENT_EXIT, _PTRACE_EVENT_STOP = 1, 0x40, 6, 128
_PTRACE_O_SUSPEND_SECCOMP = 1 << 21
_WALL = 0x4000_0000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.process_vm_readv.restype = _libc.process_vm_writev.restype = ctypes.c_ssize_t
_ONE, _NO_FLAGS = ctypes.c_ulong(1), ctypes.c_ulong(0)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Put this process (its future children, for CLONE_NEWPID) into new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int = 0) -> None:
    """Enter the namespace that `fd` refers to (its future children, for a pid namespace)."""
    _checked(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _checked(
        _libc.mount(*map(os.fsencode, (source, target, kind)), ctypes.c_ulong(flags), os.fsencode(data)),
        f"mount {kind} on {target}",
    )


def mount_points() -> list[str]:
    """Return where something is mounted for this process, in the kernel's order; some may be named twice."""
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split(b" ")[4] for line in file]
    # Blanks, line ends and backslashes are written as octal escapes, all else as it is.
    return [os.fsdecode(point.decode("unicode_escape").encode("latin-1")) for point in points]


def unmount(path: str) -> None:
    """Take a mount away, at once for new users and once they are done for those who use it."""
    _checked(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"umount {path}")


def change_root(path: str) -> None:
    """Make a mount point the root of this mount namespace, and take the old root out of it.

    Processes of the namespace whose root or working folder was the old root get the new one.
    """
    os.chdir(path)
    _checked(_libc.pivot_root(b".", b"."), f"pivot_root {path}")
    unmount(".")


def tmpfs_fd() -> int:
    """Return a descriptor of the root of a new, empty tmpfs that is mounted nowhere.

    Nothing else can see it, and the kernel frees it with the last descriptor, also when we are killed: a
    place for CRIU's small images that cannot be left behind. The descriptor is close-on-exec.
    """
    context = _checked(_libc.syscall(_SYS_FSOPEN, b"tmpfs", 1), "fsopen tmpfs")
    try:
        _checked(
            _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"mode", b"0700", 0), "fsconfig mode"
        )
        # Large folios for large writes, where the kernel has them: the overflow fills a third faster.
        _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"huge", b"within_size", 0)
        _checked(
            _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig create"
        )
        root = _checked(_libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC_MOUNT, 0), "fsmount tmpfs")
        try:  # fsmount gives an O_PATH descriptor, which cannot be listed
            return os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(root)
    finally:
        os.close(context)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the memory or blocks behind a range of a file; it reads as zeros from now on."""
    flags = _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE
    _checked(_libc.fallocate64(fd, flags, ctypes.c_long(offset), ctypes.c_long(length)), "fallocate")


def is_in_memory(address: int, length: int) -> bool:
    """Whether all pages of a file that is mapped at `address` are in the page cache: none would be waited
    for."""
    count = -(-length // mmap.PAGESIZE)
    found = ctypes.create_string_buffer(count)
    _checked(_libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), found), "mincore")
    return found.raw[:count].count(1) == count


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate descriptor `fd` of the process behind `pidfd` into this one."""
    return _checked(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0), "pidfd_getfd")


def status_of_reaped(pidfd: int) -> int | None:
    """The exit status of a process that its parent has reaped; None where the kernel does not tell (before
    Linux 6.15), or it was not reaped yet."""
    info = bytearray(struct.pack("=Q56x", _PIDFD_INFO_EXIT))
    try:
        ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, status = struct.unpack("=Q52xi", info)
    return int(status) if mask & _PIDFD_INFO_EXIT else None


def copy_descriptor(pid: int, fd: int) -> int:
    """Duplicate descriptor `fd` of a process into this one."""
    pidfd = os.pidfd_open(pid)
    try:
        return pidfd_getfd(pidfd, fd)
    finally:
        os.close(pidfd)


def terminal_number(master: int) -> int:
    """Return N of /dev/pts/N, which this descriptor drives."""
    return _number_from(master, _TIOCGPTN)


def terminal_device(fd: int) -> int:
    """Return the kernel's number of the terminal itself, also behind /dev/tty; as /proc/PID/stat has it."""
    return _number_from(fd, _TIOCGDEV)


def _number_from(fd: int, request: int) -> int:
    (number,) = struct.unpack("=I", ioctl(fd, request, b"\0\0\0\0"))
    return int(number)


def hang_up(master: int) -> None:
    """Have a pseudo-terminal that nobody has opened yet be one that everybody has closed: reads end."""
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    os.close(_checked(_libc.ioctl(master, _TIOCGPTPEER, flags), "ioctl TIOCGPTPEER"))


def die_with_parent(signal: int) -> None:
    """Ask the kernel to send `signal` to this process when the thread that forked it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl PDEATHSIG")


_HURRY = 10
"""By how much `hurry` lowers the nice value: nine times the share of a busy core."""


def signal_name(number: int) -> str:
    """What a signal is called; those for real-time use have no names of their own."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signals.SIGRTMIN}"


def hurry() -> int:
    """Have this thread, and what it starts, go before others on a busy machine; return its nice value so far.

    For as long as a tree stands still, which waits for us. Without CAP_SYS_NICE all stays as it is.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, before - _HURRY)
    except OSError:
        pass
    return before


def go_first(pid: int) -> None:
    """Have a process go before all others that want a processor, for as long as it lives.

    For who holds a tree's threads for microseconds at a time. Without CAP_SYS_NICE all stays as it is.
    """
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        pass


_OOM_SCORE = "/proc/self/oom_score_adj"
_oom_score_before = ""


@contextmanager
def gone_first_without_memory() -> Iterator[str]:
    """Within the block, where memory runs out, the kernel ends this process and what it starts, not others.

    By itself it takes the largest, which in a container is the program that somebody is to look after. The
    block is given the score that others have (empty: not known).
    """
    global _oom_score_before
    _oom_score_before = go_first_without_memory()
    try:
        yield _oom_score_before
    finally:
        _set_oom_score(_oom_score_before)


def go_first_without_memory() -> str:
    """Have the kernel end this process, and what it starts, before others where memory runs out; return the
    score that it had."""
    return _set_oom_score("1000")


def stay_without_memory() -> None:
    """Have this process, started in such a block, be ended as late as if there were none."""
    _set_oom_score(_oom_score_before)


def _set_oom_score(score: str) -> str:
    """Set it, where that is allowed; return what it was."""
    try:
        with open(_OOM_SCORE, "r+") as file:
            before = file.read().strip()
            file.write(score)
            return before
    except OSError:
        return ""


def set_nice(nice: int) -> None:
    """Give this thread a nice value that it had before."""
    os.setpriority(os.PRIO_PROCESS, 0, nice)


def become_subreaper() -> None:
    """Make this process the parent of orphans among its descendants."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl CHILD_SUBREAPER")


def loopback_up() -> None:
    """Bring `lo` up in this network namespace (CRIU does not start without it)."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        ioctl(sock, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        struct.pack_into("H", request, 16, flags | _IFF_UP)
        ioctl(sock, _SIOCSIFFLAGS, request)


def in_network(network: int, work: Callable[[], None]) -> None:
    """Have a thread do this in the network of this descriptor, as a network is a thread's own; return when it
    is done. Raises what keeps it from there, or what `work` raises, if that is an OSError."""
    import threading

    failed: list[OSError] = []

    def enter_and_work() -> None:
        try:
            setns(network, CLONE_NEWNET)
            work()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter_and_work, name="network")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def own_every_address() -> None:
    """Have every address of this network namespace be one of `lo` (IPv6 as far as it is there).

    Sockets can then be bound and connected to any.
    """
    import socket

    loopback = socket.if_nametoindex("lo")
    for family in (socket.AF_INET, socket.AF_INET6):
        route = struct.pack("8BI", family, 0, 0, 0, _RT_TABLE_LOCAL, 0, _RT_SCOPE_HOST, _RTN_LOCAL, 0)
        route += struct.pack("HHI", 8, _RTA_OIF, loopback)
        header = struct.pack("IHHII", 16 + len(route), _RTM_NEWROUTE, _NLM_F_REQUEST_CREATE_ACK, 1, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
            kernel.send(header + route)
            (error,) = struct.unpack_from("i", kernel.recv(4096), 16)
        if error and family == socket.AF_INET:
            raise OSError(-error, f"routing everything to lo: {os.strerror(-error)}")


def quiet_fork() -> int:
    """Fork; the child has the default signal handling from its first instruction on.

    Without this a signal right after the fork would run the parent's Python handlers in the child.
    """
    before = signals.pthread_sigmask(signals.SIG_BLOCK, signals.valid_signals())
    try:
        pid = os.fork()
    except OSError:
        signals.pthread_sigmask(signals.SIG_SETMASK, before)
        raise
    if pid == 0:
        for name in ("INT", "TERM", "HUP", "QUIT", "ALRM", "CHLD", "TSTP", "TTIN", "TTOU"):
            signals.signal(signals.Signals[f"SIG{name}"], signals.SIG_DFL)
        signals.set_wakeup_fd(-1)  # it is the parent's that would wake
        signals.pthread_sigmask(signals.SIG_SETMASK, ())
    else:
        signals.pthread_sigmask(signals.SIG_SETMASK, before)
    return pid


@contextmanager
def signals_held() -> Iterator[None]:
    """Within the block no handler of a signal runs in this thread: what has come is heard at its end.

    For what must be done as a whole: a thread whose start was interrupted runs, and cannot be joined.
    """
    before = signals.pthread_sigmask(signals.SIG_BLOCK, signals.valid_signals())
    try:
        yield
    finally:
        signals.pthread_sigmask(signals.SIG_SETMASK, before)


def close_all_but(*kept: int) -> None:
    """Close every descriptor but these; what 0, 1 and 2 were leads nowhere.

    For a process that was forked: nobody who waits for its parent's end, or its output's, is to wait for it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue


class Stop(NamedTuple):
    """Why a traced process has stopped: a signal for it, or (`is_exit`) its own end."""

    signal: int
    is_exit: bool


def trace_exit(pid: int) -> None:
    """Become the tracer of a process, which the kernel then stops for us on its way out, killed or not."""
    _checked(
        _libc.ptrace(_PTRACE_SEIZE, pid, None, _PTRACE_O_TRACESYSGOOD | _PTRACE_O_TRACEEXIT), "ptrace SEIZE"
    )


def wait_for_stop(pid: int) -> Stop | None:
    """Wait until a process that we trace stops; None when it has ended.

    A stop by job control is left as it is.
    """
    return _next_stop(pid, 0)


def stopped_again(pid: int) -> Stop | None:
    """The stop at which a process that had stopped for us stands by now, if that is another.

    A process that is killed leaves its stop, and stops again on its way out: told to go on from where it was
    seen, it would be let go from there.
    """
    return _next_stop(pid, os.WNOHANG)


def _next_stop(pid: int, flags: int) -> Stop | None:
    while True:
        try:
            found, status = os.waitpid(pid, _WALL | flags)
        except ChildProcessError:
            return None
        if not found or not os.WIFSTOPPED(status):
            return None
        event = status >> 16
        if event == _PTRACE_EVENT_STOP and os.WSTOPSIG(status) != signals.SIGTRAP:
            _checked(_libc.ptrace(_PTRACE_LISTEN, pid, None, None), "ptrace LISTEN")
            continue
        return Stop(0 if event else os.WSTOPSIG(status), event == _PTRACE_EVENT_EXIT)


def exit_status(pid: int) -> int:
    """The wait status with which a process is ending that has stopped for us on its way out."""
    message = ctypes.c_ulong()
    _checked(_libc.ptrace(_PTRACE_GETEVENTMSG, pid, None, ctypes.addressof(message)), "ptrace GETEVENTMSG")
    return message.value


def go_on(pid: int, signal: int) -> None:
    """Let a process that has stopped for us go on, with this signal delivered (0: none).

    It is not an error when it was killed meanwhile.
    """
    try:
        _checked(_libc.ptrace(_PTRACE_CONT, pid, None, signal), "ptrace CONT")
    except ProcessLookupError:
        pass


GENERAL, XSTATE = 1, 0x202
"""Sets of registers of a thread, as ptrace(2) numbers them: NT_PRSTATUS, NT_X86_XSTATE."""
_REGISTERS_LIMIT = 16 << 10
_PROMPT_S = 0.0003


def seize(tid: int, *, past_filters: bool = False) -> None:
    """Become the tracer of a thread. PermissionError while it has another one.

    `past_filters`: as long as we are, its seccomp filters have no say. PermissionError where we have some.
    """
    options = _PTRACE_O_TRACESYSGOOD | (_PTRACE_O_SUSPEND_SECCOMP if past_filters else 0)
    _checked(_libc.ptrace(_PTRACE_SEIZE, tid, None, options), "ptrace SEIZE")


def interrupt(tid: int) -> None:
    """Have a thread that we trace stop soon, or once more."""
    _checked(_libc.ptrace(_PTRACE_INTERRUPT, tid, None, None), "ptrace INTERRUPT")


def wait_for_thread(tid: int, limit_s: float | None = None) -> tuple[int, bool]:
    """Wait until a thread that we trace stops; return the stop's signal, and whether the thread is to get it.

    SIGTRAP with 128 added is a system call. Raises ProcessLookupError when the thread ends, TimeoutError
    when it has not stopped in so many seconds.
    """
    if limit_s is None:
        _, status = os.waitpid(tid, _WALL)
    else:
        status = _status_within(tid, limit_s)
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} ended")
    number = os.WSTOPSIG(status)
    return number, not status >> 16 and number < 128


def _status_within(tid: int, limit_s: float) -> int:
    """A thread's wait status. Most stop in microseconds: only others are waited for in steps."""
    began = time.monotonic()
    while True:
        found, status = os.waitpid(tid, _WALL | os.WNOHANG)
        if found:
            return status
        waited_s = time.monotonic() - began
        if waited_s > limit_s:
            raise TimeoutError(errno.ETIMEDOUT, f"thread {tid} does not stop")
        time.sleep(0 if waited_s < _PROMPT_S else _PROMPT_S)


def go_on_to_system_call(tid: int) -> None:
    """Let a thread that has stopped for us go on until it enters, or leaves, a system call."""
    _checked(_libc.ptrace(_PTRACE_SYSCALL, tid, None, None), "ptrace SYSCALL")


def let_go(tid: int) -> None:
    """Have a thread that we hold go on, untraced. It is not an error when it was killed meanwhile."""
    try:
        _checked(_libc.ptrace(_PTRACE_DETACH, tid, None, 0), "ptrace DETACH")
    except ProcessLookupError:
        pass


def registers(tid: int, kind: int) -> bytes:
    """Return the registers of a thread that we hold, as the kernel lays them out."""
    buffer = ctypes.create_string_buffer(_REGISTERS_LIMIT)
    vector = _Vector(ctypes.addressof(buffer), _REGISTERS_LIMIT)
    _checked(_libc.ptrace(_PTRACE_GETREGSET, tid, kind, ctypes.addressof(vector)), "ptrace GETREGSET")
    return buffer.raw[: vector.length]


def set_registers(tid: int, kind: int, values: bytes) -> None:
    """Give a thread that we hold registers, as `registers` returned them."""
    buffer = ctypes.create_string_buffer(values, len(values))
    vector = _Vector(ctypes.addressof(buffer), len(values))
    _checked(_libc.ptrace(_PTRACE_SETREGSET, tid, kind, ctypes.addressof(vector)), "ptrace SETREGSET")


def block_signals(tid: int, mask: int) -> None:
    """Set which signals a thread that we hold blocks: bit 0 for signal 1."""
    blocked = ctypes.c_uint64(mask)
    _checked(
        _libc.ptrace(_PTRACE_SETSIGMASK, tid, ctypes.sizeof(blocked), ctypes.addressof(blocked)),
        "ptrace SETSIGMASK",
    )


def blocked_signals(tid: int) -> int:
    """Return which signals a thread that we hold blocks: bit 0 for signal 1."""
    blocked = ctypes.c_uint64()
    _checked(
        _libc.ptrace(_PTRACE_GETSIGMASK, tid, ctypes.sizeof(blocked), ctypes.addressof(blocked)),
        "ptrace GETSIGMASK",
    )
    return blocked.value


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def write_memory(pid: int, at: int, address: int, size: int) -> int:
    """process_vm_writev(2): copy `size` bytes at our `address` to `at` in a process; return how many."""
    ours, theirs = _Vector(address, size), _Vector(at, size)
    written = _libc.process_vm_writev(pid, ctypes.byref(ours), _ONE, ctypes.byref(theirs), _ONE, _NO_FLAGS)
    return _checked(written, f"process_vm_writev {pid}")


def read_scattered(pid: int, address: int, parts: Sequence[tuple[int, int, int]]) -> int:
    """process_vm_readv(2) of many parts: where each goes (bytes behind our `address`), where it is in the
    process, how large it is. Return how many bytes were copied: up to the first that could not be."""
    return _scattered(_libc.process_vm_readv, pid, address, parts)


def write_scattered(pid: int, address: int, parts: Sequence[tuple[int, int, int]]) -> int:
    """process_vm_writev(2) of many parts: where each begins (bytes behind our `address`), where it goes in
    the process, how large it is. Return how many bytes were copied: up to the first that could not be."""
    return _scattered(_libc.process_vm_writev, pid, address, parts)


def _scattered(
    call: Callable[..., int], pid: int, address: int, parts: Sequence[tuple[int, int, int]]
) -> int:
    """One of the two: `address` with the first column of `parts` is ours, the second is the process's."""
    ours, theirs = array("Q", bytes(16 * len(parts))), array("Q", bytes(16 * len(parts)))
    begins, places, sizes = (array("Q", column) for column in zip(*parts, strict=True))
    ours[::2], theirs[::2] = array("Q", [address + begin for begin in begins]), places
    ours[1::2] = theirs[1::2] = sizes
    count = ctypes.c_ulong(len(parts))
    vectors = (ctypes.c_void_p(one.buffer_info()[0]) for one in (ours, theirs))
    done = call(pid, next(vectors), count, next(vectors), count, _NO_FLAGS)
    return _checked(done, f"{call.__name__} {pid}")


def io_priority(tid: int) -> int:
    """Return a thread's input/output priority, class and level in one as ioprio_get(2) has it; 0: none."""
    return _checked(_libc.syscall(_SYS_IOPRIO_GET, _IOPRIO_WHO_PROCESS, tid), "ioprio_get")


def set_io_priority(tid: int, value: int) -> None:
    """Give a thread an input/output priority, as `io_priority` returned it."""
    _checked(_libc.syscall(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, tid, value), "ioprio_set")


def open_by_handle(mount_fd: int, kind: int, handle: bytes) -> int:
    """Return a descriptor (O_PATH) of the file with this handle on the file system behind `mount_fd`."""
    raw = ctypes.create_string_buffer(struct.pack("=Ii", len(handle), kind) + handle)
    return _checked(_libc.open_by_handle_at(mount_fd, raw, os.O_PATH | os.O_CLOEXEC), "open_by_handle_at")


def is_same_open_file(pid: int, fd: int, other_pid: int, other_fd: int) -> bool:
    """Say whether two descriptors are one open file: opened once, then inherited or duplicated."""
    return _checked(_libc.syscall(_SYS_KCMP, pid, other_pid, _KCMP_FILE, fd, other_fd), "kcmp") == 0


def shares(tid: int, other: int, what: int) -> bool:
    """Say whether two threads, of whatever processes, share `what` (one of KCMP_*)."""
    return _checked(_libc.syscall(_SYS_KCMP, tid, other, what, 0, 0), "kcmp") == 0


def file_of_socket(fd: int) -> int:
    """Return a descriptor (O_PATH) of the file that a unix socket is bound to, under whatever name."""
    return _checked(_libc.ioctl(fd, _SIOCUNIXFILE, 0), "ioctl SIOCUNIXFILE")


def is_epoll_target(pid: int, fd: int, epoll: int, target: int, index: int) -> bool:
    """Say whether `fd` of a process is what its `epoll` has as number `target`, the `index`-th of those."""
    slot = ctypes.create_string_buffer(struct.pack("=III", epoll, target, index))
    result = _libc.syscall(_SYS_KCMP, pid, pid, _KCMP_EPOLL_TFD, fd, ctypes.c_void_p(ctypes.addressof(slot)))
    return _checked(result, "kcmp") == 0

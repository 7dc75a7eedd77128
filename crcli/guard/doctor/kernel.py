"""The kernel: its version, what it is set to, and what of it matters to processes that are to be dumped."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.guard.doctor.check import Check, lacks, note, passed, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SYSTEM = "/proc/sys/kernel"
_FEW_PIDS = 1 << 16


def _version() -> Iterator[Check]:
    name = os.uname()
    numbers = re.match(r"(\d+)\.(\d+)", name.release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    says = f"Linux {name.release} on {name.machine}"
    evidence = {"release": name.release, "machine": name.machine}
    if version >= (5, 5) and name.machine in ("x86_64", "aarch64"):
        yield passed("kernel", says, **evidence)
    else:
        yield lacks("kernel", says, "crcli needs Linux 5.5 or newer on x86_64 or aarch64", **evidence)


def _namespaces() -> Iterator[Check]:
    kinds = {
        "pid": kernel.CLONE_NEWPID,
        "mount": kernel.CLONE_NEWNS,
        "network": kernel.CLONE_NEWNET,
        "ipc": kernel.CLONE_NEWIPC,
    }
    refused = [name for name, flag in kinds.items() if not works_in_child(partial(kernel.unshare, flag))]
    if refused:
        remedy = "grant CAP_SYS_ADMIN, and let the container's seccomp filter pass unshare"
        yield lacks("namespaces", f"cannot make namespaces: {', '.join(refused)}", remedy, refused=refused)
    else:
        yield passed("namespaces", "can be made, for trials and restores", refused=refused)


def works_in_child(attempt: Callable[[], None]) -> bool:
    """Whether something can be done, tried in a process of its own that ends with it."""
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _tracing() -> Iterator[Check]:
    scope = read(f"{_SYSTEM}/yama/ptrace_scope")
    evidence = {"yama_ptrace_scope": int(scope) if scope else None}
    if _can_trace():
        yield passed("tracing", "other processes can be stopped and looked into", **evidence)
        return
    remedy = "grant CAP_SYS_PTRACE and let the container's seccomp filter pass ptrace"
    if scope == "3":
        remedy = "kernel.yama.ptrace_scope is 3, which forbids it until the next boot: set it to 2 or less"
    yield lacks("tracing", "no process can be traced, so none can be stopped", remedy, **evidence)


def _can_trace() -> bool:
    """Stop a child of our own by the means that CRIU uses."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        kernel.trace_exit(child)
        return True
    except OSError:
        return False
    finally:
        os.kill(child, signal.SIGKILL)
        while kernel.wait_for_stop(child) is not None:
            kernel.go_on(child, 0)


def _pidfds() -> Iterator[Check]:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        yield lacks("pidfd", f"no pidfds: {error.strerror}", "let the container's seccomp filter pass them")
        return
    yield passed("pidfd", "processes can be held by descriptor")


def _io_uring() -> Iterator[Check]:
    setting = read(f"{_SYSTEM}/io_uring_disabled")
    evidence = {"io_uring_disabled": int(setting) if setting else None}
    if setting in ("1", "2"):
        yield passed("io-uring", "programs fall back on what can be dumped: io_uring is off", **evidence)
    else:
        yield note(
            "io-uring",
            "programs may use io_uring here, and cannot be dumped while they do (event loops of libuv can)",
            "set the sysctl kernel.io_uring_disabled=2",
            **evidence,
        )


def _pids() -> Iterator[Check]:
    most = int(read(f"{_SYSTEM}/pid_max") or 0)
    if most < _FEW_PIDS:
        yield note(
            "pid-max",
            f"only {most} process ids: a tree's own are soon taken, and it then gets a pid namespace",
            "set the sysctl kernel.pid_max=4194304",
            pid_max=most,
        )
    else:
        yield passed("pid-max", f"{most} process ids", pid_max=most)


def _protection() -> Iterator[Check]:
    """Filters and profiles in force on us, which CRIU inherits."""
    modules = [name for name in read("/sys/kernel/security/lsm").split(",") if name]
    profile = read("/proc/self/attr/apparmor/current") or read("/proc/self/attr/current")
    if profile and "unconfined" not in profile and {"apparmor", "selinux"} & set(modules):
        yield note(
            "security-profile",
            f"crcli itself is confined by {profile}",
            "if dumps fail for want of permission, start it unconfined",
            modules=modules,
            profile=profile,
        )
    else:
        yield passed("security-profile", "crcli is not confined", modules=modules, profile=profile)
    if (mode := _status_of_self("Seccomp")) == "2":
        yield note(
            "seccomp",
            "crcli itself runs under a seccomp filter: processes with filters of their own cannot be dumped",
            "start its container with --security-opt seccomp=unconfined",
            mode=int(mode),
        )
    else:
        yield passed("seccomp", "no filter on crcli's own calls", mode=int(mode or 0))


def _status_of_self(field: str) -> str:
    for line in read("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _version,
    _namespaces,
    _tracing,
    _pidfds,
    _io_uring,
    _pids,
    _protection,
)

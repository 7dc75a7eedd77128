"""What this machine is and lets us do, before anything depends on it: so that failure teaches something too.

    python -m tests.gpu.real.probe STEP SETTING     one step, in a process of its own; prints one JSON object

A step never raises for what the machine refuses: the refusal is what it reports, with its code.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import gzip
import json
import mmap
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from crcli import kernel
from crcli.criu.binary import criu_command
from crcli.errors import CrcliError
from crcli.gpu import managed as uvm
from crcli.gpu.inherited import forked_from, take_devices
from crcli.process.identity import identify
from tests.gpu.real import growth
from tests.gpu.real.commands import Failed, end_descendants, run
from tests.gpu.real.cuda_calls import Calls
from tests.gpu.real.setting import MIB, Setting
from tests.gpu.real.subject import Subject

KERNEL_OPTIONS = (
    "CHECKPOINT_RESTORE", "NAMESPACES", "UTS_NS", "IPC_NS", "PID_NS", "NET_NS", "TIME_NS", "USER_NS",
    "FHANDLE", "EVENTFD", "EPOLL", "INOTIFY_USER", "UNIX_DIAG", "INET_DIAG", "INET_TCP_DIAG", "INET_UDP_DIAG",
    "PACKET_DIAG", "NETLINK_DIAG", "NF_TABLES", "USERFAULTFD", "MEM_SOFT_DIRTY", "PROC_PAGE_MONITOR",
    "CROSS_MEMORY_ATTACH", "KCMP", "SECCOMP", "TRANSPARENT_HUGEPAGE", "IO_URING", "PROC_CHILDREN", "TUN",
)  # fmt: skip
"""Options of the kernel that CRIU, or crcli, needs or makes use of."""

_PTRACE_SEIZE = 0x4206
_NAMESPACES = {
    "mount": kernel.CLONE_NEWNS, "pid": kernel.CLONE_NEWPID, "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC, "time": 0x80,
}  # fmt: skip
_SYS_USERFAULTFD = 282 if os.uname().machine == "aarch64" else 323
_LOOK_OF_TORCH = """
import json, time
began = time.monotonic()
import torch
imported = time.monotonic()
told = {"import_s": imported - began, "version": torch.__version__, "cuda": torch.version.cuda}
try:
    import cupy, safetensors
    told["device"] = torch.cuda.get_device_name()
    told["free_and_total"] = torch.cuda.mem_get_info()
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    told["matmul"] = bool(torch.isfinite(a @ a).all())
except Exception as error:
    told["error"] = repr(error)
print(json.dumps(told | {"cuda_s": time.monotonic() - imported}))
"""
_DEVICE_ATTRIBUTES = (
    "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT", "UNIFIED_ADDRESSING",
    "MANAGED_MEMORY", "CONCURRENT_MANAGED_ACCESS", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
)  # fmt: skip


def host(_: Setting) -> dict[str, Any]:
    """The machine: kernel, sandbox, processors, memory, what it runs."""
    return {
        "uname": list(platform.uname()),
        "version": _text("/proc/version").strip(),
        "gvisor": is_gvisor(),
        "system": _text("/etc/os-release").splitlines()[:2],
        "libc": " ".join(platform.libc_ver()),
        "python": [sys.version, sys.executable],
        "cpu": next((line for line in _text("/proc/cpuinfo").splitlines() if "model name" in line), ""),
        "cpus": os.cpu_count(),
        "memory": growth.told(),
        "cgroup_memory": [_text(f"/sys/fs/cgroup/{name}").strip() for name in ("memory.max", "memory.high")],
        "uid": os.getuid(),
        "pid_1": _text("/proc/1/comm").strip(),
        "cgroup": _text("/proc/self/cgroup").strip(),
        "uptime": _text("/proc/uptime").split()[:1],
        "pid_max": _text("/proc/sys/kernel/pid_max").strip(),
        "overcommit": _text("/proc/sys/vm/overcommit_memory").strip(),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
    }


def is_gvisor() -> bool:
    """Whether this is gVisor, which has no CRIU: its kernel is none."""
    if "gVisor" in _text("/proc/version"):
        return True
    log = run(["dmesg"], 10, cwd="/").out if shutil.which("dmesg") else ""
    return "gVisor" in log or (platform.release() == "4.4.0" and "2016" in platform.version())


def kernel_options(_: Setting) -> dict[str, Any]:
    """The options of the kernel that matter here, where it tells them: y, m or n."""
    for path in (
        "/proc/config.gz",
        f"/boot/config-{platform.release()}",
        f"/lib/modules/{platform.release()}/config",
    ):
        if os.path.exists(path):
            with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
                given = dict(line.strip().split("=", 1) for line in file if line.startswith("CONFIG_"))
            return {"from": path} | {name: given.get(f"CONFIG_{name}", "n") for name in KERNEL_OPTIONS}
    return {"from": "nowhere: this kernel does not tell its configuration"}


def rights(_: Setting) -> dict[str, Any]:
    """What we may do: capabilities, ptrace, others' memory, namespaces, and so on ("" where it works)."""
    status = dict(line.split(":", 1) for line in _text("/proc/self/status").splitlines() if ":" in line)
    told = {name: status.get(name, "").strip() for name in ("CapEff", "CapBnd", "Seccomp", "NoNewPrivs")}
    with _child() as pid:
        told |= {
            "ptrace": _refusal(lambda: _seize(pid)),
            "proc_mem": _refusal(_write_memory),
            "pagemap": _refusal(lambda: _read(f"/proc/{pid}/pagemap", 8)),
            "map_files": _refusal(lambda: _read_links(f"/proc/{pid}/map_files")),
            "kcmp": _refusal(lambda: kernel.is_epoll_target(pid, 0, 0, 0, 0), allowed=(2, 9, 22)),
        }
    told |= {
        f"namespace_{name}": _in_a_child(partial(kernel.unshare, it)) for name, it in _NAMESPACES.items()
    }
    told |= {
        "next_pid": _refusal(_choose_next_pid),
        "userfaultfd": _refusal(_open_userfaultfd),
        "drop_caches": "" if os.access("/proc/sys/vm/drop_caches", os.W_OK) else "not writable",
        "yama": _text("/proc/sys/kernel/yama/ptrace_scope").strip(),
        "security": _text("/sys/kernel/security/lsm").strip(),
    }
    return told


def storage(setting: Setting) -> dict[str, Any]:
    """The disk below the work folder: its room, and how fast a file of 1/16 of the weights is written (until
    durable) and read."""
    path, block = setting.folder / "storage", os.urandom(setting.weights_bytes // 128)
    began = time.monotonic()
    with path.open("wb") as file:
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.monotonic()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(4 * MIB):
            pass
    read = time.monotonic()
    mebibytes = 8 * len(block) / MIB
    path.unlink()
    return {
        "folder": setting.work,
        "mount": _mount_of(setting.work),
        "free_gib": round(shutil.disk_usage(setting.work).free / 2**30, 1),
        "write_mib_s": round(mebibytes / (written - began)),
        "read_mib_s": round(mebibytes / (read - written)),
    }


def nvidia(_: Setting) -> dict[str, Any]:
    """The driver as its own tools and files tell it."""
    fields = (
        "name,uuid,driver_version,vbios_version,memory.total,memory.used,persistence_mode,mig.mode.current,"
        "compute_cap,compute_mode,pcie.link.gen.current,pcie.link.width.current"
    )
    query = (
        run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], 30)
        if shutil.which("nvidia-smi")
        else None
    )
    return {
        "smi": query.said if query else "no nvidia-smi",
        "version": _text("/proc/driver/nvidia/version"),
        "params": _text("/proc/driver/nvidia/params"),
        "devices": [f"{path} {os.stat(path).st_rdev:#x}" for path in sorted(glob.glob("/dev/nvidia*"))],
        "mounts": [line for line in _text("/proc/self/mounts").splitlines() if "nvidia" in line],
        "libraries": sorted(glob.glob("/usr/local/nvidia/lib*/libcuda*") + glob.glob("/usr/lib/*/libcuda*")),
        "ld_library_path": os.environ.get("LD_LIBRARY_PATH", ""),
    }


def cuda(_: Setting) -> dict[str, Any]:
    """The driver API: cuInit, versions, and each device. All calls with their codes and times."""
    calls = Calls()
    told: dict[str, Any] = {"calls": calls.noted, "bindings": _version_of("cuda-bindings")}
    with _told_failure(told):
        calls.init()
        told["driver_version"] = calls.call("cuDriverGetVersion")
        told["devices"] = [_device(calls, number) for number in range(calls.call("cuDeviceGetCount"))]
        told["libcuda"] = sorted(
            {line.split()[-1] for line in _text("/proc/self/maps").splitlines() if "libcuda" in line}
        )
    return told


def cycle(setting: Setting) -> dict[str, Any]:
    """A tiny CUDA process locked, checkpointed, restored and unlocked, without CRIU; what it maps and
    has open in each state."""
    calls = Calls()
    told: dict[str, Any] = {"calls": calls.noted, "states": [], "evidence": {}}
    folder = setting.folder / "cycle"
    with (
        _told_failure(told),
        Subject(setting, folder, "counter", "--mebibytes", "4", library="driver") as subject,
    ):
        subject.wait_ready(60)
        subject.wait_steps(3, 10)
        calls.init()
        calls.tried("cuCheckpointProcessGetRestoreThreadId", pid=subject.pid)
        for step in ("", "lock", "checkpoint", "restore", "unlock"):
            if step:
                getattr(calls, step)(subject.pid)
            state = calls.state(subject.pid)
            told["states"].append(f"{step or 'before'}: {state}")
            told["evidence"][step or "before"] = _evidence(subject.pid)
        subject.wait_more(3, 10)
        told["goes_on"] = True
    return told


def managed(setting: Setting) -> dict[str, Any]:
    """What the driver maps of its UVM device for programs with and without managed memory, whether
    crcli's rule tells them apart, and what a checkpoint makes of managed memory."""
    told: dict[str, Any] = {}
    for title, program, *arguments in (
        ("torch", "counter", "--mebibytes", "64"),
        ("cupy", "counter", "--mebibytes", "64"),
        ("managed-2", "managed", "--mebibytes", "2"),
        ("managed-64", "managed", "--mebibytes", "64", "8"),
    ):
        library = title if program == "counter" else "driver"
        folder, found = setting.folder / title, told.setdefault(title, {})
        with _told_failure(found), Subject(setting, folder, program, *arguments, library=library) as subject:
            subject.wait_ready(60)
            subject.wait_steps(3, 20)
            maps, smaps = (_text(f"/proc/{subject.pid}/{name}").encode() for name in ("maps", "smaps"))
            wiped = set(uvm.wiped_on_fork(smaps))
            found["pieces"] = [
                f"{one.start:#x} {(one.end - one.start) >> 20} MiB{' wiped on fork' * (one in wiped)}"
                for one in uvm.pieces(maps)
            ]
            found["managed_bytes"] = uvm.managed_bytes(subject.pid)
            if program == "managed":
                _checkpointed(subject, found)
    return told


def _checkpointed(subject: Subject, found: dict[str, Any]) -> None:
    """Lock and checkpoint it, whatever comes of it, and see whether it goes on."""
    calls = Calls()
    found["calls"] = calls.noted
    calls.init()
    calls.lock(subject.pid)
    calls.tried("cuCheckpointProcessCheckpoint", None, pid=subject.pid)
    found["state"] = calls.state(subject.pid)
    if found["state"] == "CHECKPOINTED":
        calls.restore(subject.pid)
    calls.unlock(subject.pid)
    subject.wait_more(3, 10)
    found["goes_on"] = True


def forked(setting: Setting) -> dict[str, Any]:
    """What forks of a CUDA process hold of its devices, and what a checkpoint makes of that one: while they
    hold them, and once they were taken from them."""
    calls = Calls()
    told: dict[str, Any] = {"calls": calls.noted}
    with _told_failure(told), Subject(setting, setting.folder / "forked", "loader") as subject:
        subject.wait_ready(60)
        calls.init()
        children = subject.tree()[1:]
        for title in ("held", "taken"):
            found = told.setdefault(title, {})
            if title == "taken":
                for pid in children:
                    take_devices(identify(pid))
            found["forked_from"] = {pid: forked_from(pid, [subject.pid]) for pid in children}
            found["children"] = {pid: _evidence(pid) | {"areas": _device_areas(pid)} for pid in children}
            found["parent"] = _evidence(subject.pid) | {"areas": _device_areas(subject.pid)}
            calls.lock(subject.pid)
            calls.tried("cuCheckpointProcessCheckpoint", None, pid=subject.pid)
            found["state"] = calls.state(subject.pid)
            found["parent_then"] = _evidence(subject.pid)
            found["memory_then"] = run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv"], 20).said
            if found["state"] == "CHECKPOINTED":
                calls.restore(subject.pid)
            calls.unlock(subject.pid)
            subject.wait_more(20, 20)
            found["goes_on"] = True
    return told


def _device_areas(pid: int) -> list[str]:
    """Where a process has NVIDIA's devices mapped, how, and with which flags."""
    found = []
    for line in _text(f"/proc/{pid}/smaps").splitlines():
        if "-" in line.split(" ")[0]:
            here = "/dev/nvidia" in line
            if here:
                found.append(line)
        elif here and line.startswith("VmFlags:"):
            found[-1] += line.removeprefix("VmFlags:")
    return found


def torch(setting: Setting) -> dict[str, Any]:
    """What the programs' PyTorch sees. From here on its files are in the page cache."""
    done = run([setting.python, "-c", _LOOK_OF_TORCH], 120, setting.programs_environment("torch"))
    return {"said": done.said} if done.code else done.json


def memory(setting: Setting) -> dict[str, Any]:
    """The kernel's memory before and after as much as the work takes was used once (see growth.py)."""
    return growth.touched(2 * (setting.weights_bytes + setting.cache_bytes))


def criu(_: Setting) -> dict[str, Any]:
    """CRIU's own check of this kernel, at its log's level 4."""
    try:
        command = criu_command()
    except CrcliError as error:
        return {"error": str(error)}
    return {
        "command": command,
        "version": run([*command, "--version"], 20).said,
        "check": run([*command, "check", "-v4"], 40).said[-12000:],
        "check_all": run([*command, "check", "--all", "-v1"], 40).said[-6000:],
    }


def doctor(setting: Setting) -> dict[str, Any]:
    """What `crcli doctor` says of this machine, and `crcli check` of a CUDA process."""
    environment = setting.crcli_environment()
    told: dict[str, Any] = {
        "doctor": _json_of(run([sys.executable, "-m", "crcli", "doctor", "--json"], 60, environment))
    }
    library = "driver" if setting.has_cuda else "host"
    with (
        _told_failure(told),
        Subject(
            setting, setting.folder / "checked", "counter", "--mebibytes", "4", library=library
        ) as subject,
    ):
        subject.wait_ready(60)
        command = [sys.executable, "-m", "crcli", "check", str(subject.pid), "--json"]
        told["check"] = _json_of(run(command, 60, environment))
    return told


STEPS: Mapping[str, tuple[Callable[[Setting], dict[str, Any]], float]] = {
    "host": (host, 20),
    "kernel": (kernel_options, 10),
    "rights": (rights, 30),
    "nvidia": (nvidia, 40),
    "cuda": (cuda, 60),
    "torch": (torch, 130),
    "cycle": (cycle, 90),
    "managed": (managed, 100),
    "forked": (forked, 90),
    "criu": (criu, 60),
    "doctor": (doctor, 90),
    "storage": (storage, 60),
    "memory": (memory, 60),
}
"""Each step, and for how long it may run (seconds)."""

NEED_CUDA = ("nvidia", "cuda", "torch", "cycle", "managed", "forked")
NEED_KERNEL = ("criu", "doctor")
"""What makes no sense on gVisor, which is no Linux."""


def main(step: str, setting: str) -> int:
    """Take one step, and print what it found."""
    kernel.become_subreaper()
    try:
        found = STEPS[step][0](Setting.from_text(setting))
    finally:
        end_descendants()
    print(json.dumps(found))
    return 0


@contextlib.contextmanager
def _told_failure(told: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        told["error"] = str(error)
        told["said"] = error.evidence[-4000:]


def _device(calls: Calls, number: int) -> dict[str, Any]:
    from cuda.bindings import driver

    device = calls.call("cuDeviceGet", number)
    name = calls.call("cuDeviceGetName", 100, device)
    told = {
        "name": bytes(name).partition(b"\0")[0].decode(errors="replace"),
        "uuid": bytes(calls.call("cuDeviceGetUuid", device).bytes).hex(),
        "memory": calls.tried("cuDeviceTotalMem", device)[1],
    }
    for attribute in _DEVICE_ATTRIBUTES:
        if wanted := getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}", None):
            told[attribute.lower()] = calls.tried("cuDeviceGetAttribute", wanted, device)[1]
    return told


def _evidence(pid: int) -> dict[str, Any]:
    """What a process maps of NVIDIA's devices, which of them it has open, and its memory."""
    maps = [
        line.split(None, 5)[-1].strip()
        for line in _text(f"/proc/{pid}/maps").splitlines()
        if "nvidia" in line
    ]
    links = [os.readlink(path) for path in glob.glob(f"/proc/{pid}/fd/*") if os.path.islink(path)]
    status = [
        line
        for line in _text(f"/proc/{pid}/status").splitlines()
        if line.startswith(("VmRSS", "VmSize", "Thr"))
    ]
    return {
        "maps": {path: maps.count(path) for path in sorted(set(maps))},
        "open": sorted(link for link in links if link.startswith(("/dev/", "anon_inode:", "socket:"))),
        "status": status,
    }


@contextlib.contextmanager
def _child() -> Iterator[int]:
    """A process that does nothing."""
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _in_a_child(act: Callable[[], object]) -> str:
    """The refusal that a process of its own met with."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writer, _refusal(act).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as file:
        return file.read()


def _refusal(act: Callable[[], object], allowed: tuple[int, ...] = ()) -> str:
    """Empty when it could be done, or failed for a reason (errno) that only this try has; else why not."""
    try:
        act()
    except OSError as error:
        return "" if error.errno in allowed else str(error)
    return ""


def _seize(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(_PTRACE_SEIZE, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write_memory() -> None:
    """A fork of ours has a page of ours at the same address."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    with _child() as pid, open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"x")


def _read(path: str, count: int) -> None:
    with open(path, "rb", buffering=0) as file:
        file.read(count)


def _read_links(folder: str) -> None:
    for name in os.listdir(folder)[:1]:
        os.readlink(f"{folder}/{name}")


def _choose_next_pid() -> None:
    with open("/proc/sys/kernel/ns_last_pid", "r+") as file:
        last = file.read()
        file.seek(0)
        file.write(last)


def _open_userfaultfd() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(fd)


def _mount_of(path: str) -> str:
    """The line of /proc/self/mounts for the file system that holds this path."""
    lines = [line.split() for line in _text("/proc/self/mounts").splitlines()]
    held = [
        line
        for line in lines
        if os.path.realpath(path).startswith(line[1].rstrip("/") + "/") or line[1] == "/"
    ]
    return " ".join(max(held, key=lambda line: len(line[1]), default=[])[:4])


def _json_of(done: Any) -> Any:
    try:
        return done.json
    except Failed:
        return done.said[-6000:]


def _version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError as error:
        return f"({error})\n" if "/proc/driver" in path else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

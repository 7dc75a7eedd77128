"""A virtual machine under software emulation: boot a kernel, run commands there, kill it.

The machine's root is this host's, read-only (QEMU itself refuses to write), with memory over the folders that
programs write to: the same .venv and the same CRIU run there, on another kernel. Nothing that happens inside
reaches the host, and the machine ends with the block that booted it, or with us. Software emulation is ten to
thirty times slower than the processor, and takes one core of it.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from crcli import kernel as kernel_calls
from tests.support.nodes.kernels import BUSYBOX, Kernel, initramfs, kernels

ROOT = Path(__file__).parents[3]
QEMU = "qemu-system-x86_64"
BOOT_LIMIT_S = 120.0
_CPU = "max"  # with more than one processor, QEMU 7.2 crashed the kernel now and then (cmpxchg16b)
_END = b"\x01end "
_WRITABLE = ("/tmp", "/run", "/var/tmp", "/var/lib", "/var/log", "/var/cache", "/mnt")

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin:/sbin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
while read module; do insmod /lib/$module.ko; done </modules
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /new || echo "no root"
for folder in {" ".join(_WRITABLE)}; do
    [ -d /new$folder ] && mount -t tmpfs -o mode=1777 none /new$folder
done
for folder in proc sys dev; do mount --move /$folder /new/$folder; done
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts none /new/dev/pts
mount -t tmpfs none /new/dev/shm
mount -t cgroup2 none /new/sys/fs/cgroup
ip link set lo up
cat >/new/run/serve <<'SERVE'
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
printf '\\001end 0\\n' >&3
while read -r command <&3; do
    setsid sh -c "$command" </dev/null >&3 2>&1 3>&-
    printf '\\001end %d\\n' $? >&3
done
SERVE
export HOME=/tmp
exec switch_root /new /bin/sh /run/serve
"""


class MachineFailed(AssertionError):
    """The machine did not do as told: with the end of its console."""


@dataclass(frozen=True)
class Done:
    """A command that has ended inside: its exit code, and what it wrote to both streams."""

    code: int
    out: str


def why_not() -> str:
    """What this host lacks for virtual machines; empty when it lacks nothing."""
    if shutil.which(QEMU) is None:
        return f"no {QEMU} (Debian: qemu-system-x86)"
    if not BUSYBOX.exists():
        return f"no {BUSYBOX} (Debian: busybox-static)"
    hidden = next((folder for folder in _WRITABLE if ROOT.is_relative_to(folder)), "")
    if hidden:
        return f"{ROOT} lies below {hidden}, which every machine has for itself"
    return "" if kernels() else "no kernel for the guest (scripts/fetch-kernel)"


@dataclass
class Machine:
    """A running machine. Leave with the block of `booted`."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    console: Path
    _heard: bytearray = field(default_factory=bytearray)

    def run(self, command: str, limit_s: float = 60.0) -> Done:
        """Run a command of the shell (one line) in a session of its own; wait for its end."""
        assert "\n" not in command
        self.channel.sendall(command.encode() + b"\n")
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> Done:
        """Wait until the machine says that it is done with something."""
        end = time.monotonic() + limit_s
        while _END not in self._heard or b"\n" not in self._heard.partition(_END)[2]:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.channel], [], [], left)[0]:
                raise MachineFailed(f"no end within {limit_s} s:\n{self._said()}")
            data = self.channel.recv(1 << 16)
            if not data:
                raise MachineFailed(f"the machine is gone:\n{self._said()}")
            self._heard += data
        out, _, rest = self._heard.partition(_END)
        code, _, self._heard = rest.partition(b"\n")
        return Done(int(code), out.decode(errors="replace").replace("\r\n", "\n"))

    def _said(self) -> str:
        console = self.console.read_text(errors="replace")[-3000:]
        return f"{self._heard[-3000:].decode(errors='replace')}\n--- console:\n{console}"


@contextmanager
def booted(kernel: Kernel, memory_mib: int = 1024) -> Iterator[Machine]:
    """A machine with this kernel, up and waiting for commands; it is killed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="crcli-vm-") as name:
        folder = Path(name)
        (folder / "initramfs").write_bytes(initramfs(kernel, _INIT))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            command = _command(kernel, folder, memory_mib, theirs.fileno())
            process = subprocess.Popen(
                ["nice", "-n", "19", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=(folder / "qemu.log").open("wb"),
                pass_fds=[theirs.fileno()],
                preexec_fn=lambda: kernel_calls.die_with_parent(signal.SIGKILL),
            )
        try:
            with ours:
                machine = Machine(process, ours, folder / "console")
                try:
                    machine.answer(BOOT_LIMIT_S)
                except (MachineFailed, OSError) as error:
                    raise MachineFailed(f"{error}\n{(folder / 'qemu.log').read_text()}") from None
                yield machine
        finally:
            process.kill()
            process.wait()


def _command(kernel: Kernel, folder: Path, memory_mib: int, channel: int) -> list[str]:
    (folder / "console").touch()
    return [
        *(QEMU, "-accel", "tcg", "-cpu", _CPU, "-smp", "1", "-m", str(memory_mib)),
        *("-nodefaults", "-no-reboot", "-display", "none"),
        *("-kernel", os.fspath(kernel.image), "-initrd", os.fspath(folder / "initramfs")),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-chardev", f"file,id=console,path={folder / 'console'}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=channel,fd={channel}"),
        *("-serial", "chardev:channel"),
    ]

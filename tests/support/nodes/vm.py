"""A virtual machine under software emulation: boot a kernel, run commands there, kill it.

The machine's root is this host's, read-only (QEMU itself refuses to write), with memory over the folders that
programs write to: the same .venv and the same CRIU run there, on another kernel and processor. It
reaches what listens in this thread's network, and nobody reaches it. Nothing that happens inside changes
the host, and the machine ends with the block that booted it, or with us. Software emulation is ten to
thirty times slower than the processor, and takes one core of it.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from crcli import kernel as kernel_calls
from tests.support.nodes.base import Done, Node, NodeFailed
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
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
hostname NAME
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


class Machine(Node):
    """A running machine. Leave with the block of `booted`."""

    slowness = 6.0

    def __init__(self, name: str, folder: Path, command: list[str], channels: Channels) -> None:
        super().__init__(name)
        self._console = folder / "console"
        self._channel, self._monitor = channels.ours
        self._heard = bytearray()
        self._process = subprocess.Popen(
            ["nice", "-n", "5", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "qemu.log").open("wb"),
            pass_fds=[end.fileno() for end in channels.theirs],
            preexec_fn=lambda: kernel_calls.die_with_parent(signal.SIGKILL),
        )

    def execute(self, command: str, limit_s: float) -> Done:
        """See Node."""
        assert "\n" not in command
        words = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.variables().items())
        self._channel.sendall(f"export {words}; {command}\n".encode())
        return self.answer(limit_s)

    def cut(self) -> None:
        """See Node."""
        self._monitor.sendall(b"set_link net off\n")

    def mend(self) -> None:
        """See Node."""
        self._monitor.sendall(b"set_link net on\n")

    def kill(self) -> None:
        """See Node."""
        self._process.kill()
        self._process.wait()

    def answer(self, limit_s: float) -> Done:
        """Wait until the machine says that it is done with something."""
        end = time.monotonic() + limit_s
        while _END not in self._heard or b"\n" not in self._heard.partition(_END)[2]:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._channel], [], [], left)[0]:
                raise NodeFailed(f"no end within {limit_s} s:\n{self._said()}")
            data = self._channel.recv(1 << 16)
            if not data:
                raise NodeFailed(f"the machine is gone:\n{self._said()}")
            self._heard += data
        out, _, rest = self._heard.partition(_END)
        code, _, self._heard = rest.partition(b"\n")
        return Done(int(code), out.decode(errors="replace").replace("\r\n", "\n"))

    def _said(self) -> str:
        console = self._console.read_text(errors="replace")[-3000:]
        return f"{self._heard[-3000:].decode(errors='replace')}\n--- console:\n{console}"


class Channels:
    """Two sockets between us and QEMU: the machine's second serial line, and QEMU's monitor."""

    def __init__(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
        self.ours = [pair[0] for pair in pairs]
        self.theirs = [pair[1] for pair in pairs]

    def close(self) -> None:
        """Close our ends."""
        for end in self.ours:
            end.close()


@contextmanager
def booted(
    kernel: Kernel, memory_mib: int = 1024, *, name: str = "machine", ahead_s: float = 0.0
) -> Iterator[Machine]:
    """A machine with this kernel, up and waiting for commands; it is killed when the block ends.

    Its clock is `ahead_s` seconds ahead of this host's (or behind it, when that is negative).
    """
    with tempfile.TemporaryDirectory(prefix="crcli-vm-") as path:
        folder, channels = Path(path), Channels()
        (folder / "initramfs").write_bytes(initramfs(kernel, _INIT.replace("NAME", name)))
        (folder / "console").touch()
        command = _command(kernel, folder, memory_mib, ahead_s, *(end.fileno() for end in channels.theirs))
        machine = Machine(name, folder, command, channels)
        for end in channels.theirs:
            end.close()
        try:
            machine.answer(BOOT_LIMIT_S)
            yield machine
        except NodeFailed as error:
            raise NodeFailed(f"{error}\n{(folder / 'qemu.log').read_text()}") from None
        finally:
            machine.kill()
            channels.close()


def _command(
    kernel: Kernel, folder: Path, memory_mib: int, ahead_s: float, channel: int, monitor: int
) -> list[str]:
    clock = datetime.now(UTC) + timedelta(seconds=ahead_s)
    return [
        *(QEMU, "-accel", "tcg", "-cpu", _CPU, "-smp", "1", "-m", str(memory_mib)),
        *("-nodefaults", "-no-reboot", "-display", "none"),
        *("-rtc", f"base={clock:%Y-%m-%dT%H:%M:%S}"),
        *("-kernel", os.fspath(kernel.image), "-initrd", os.fspath(folder / "initramfs")),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-chardev", f"file,id=console,path={folder / 'console'}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=channel,fd={channel}"),
        *("-serial", "chardev:channel"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=readline"),
    ]

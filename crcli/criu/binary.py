"""Where the criu binary is, and how to start it.

Looked for in this order: `$CRCLI_CRIU` (an executable), crcli's own relocatable prefix
(`$CRCLI_CRIU_PREFIX`, by default /usr/local/lib/crcli/criu, made by scripts/install-criu), `criu` on PATH.
A prefix brings its own C library and is started through its own dynamic loader, so that it runs on a
system that is older than it; no other program maps that loader, because CRIU cannot restore a process
into the very file that it runs from itself.
"""

from __future__ import annotations

import os

from crcli.errors import HostLacks
from crcli.process.capabilities import CAP_SYS_ADMIN

DEFAULT_PREFIX = "/usr/local/lib/crcli/criu"
_LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}

DOES_IT_START = "`crcli doctor` says whether CRIU works here"
"""What to do about a CRIU that says nothing at all."""


def see_criu() -> None:
    """Raise HostLacks where CRIU can neither freeze nor restore: it is not here, or we may not."""
    criu_command()
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    if not effective >> CAP_SYS_ADMIN & 1:
        raise HostLacks(
            "crcli may not freeze or restore processes here: it lacks CAP_SYS_ADMIN",
            hint="run crcli as root"
            if os.geteuid()
            else "grant it to this container (--cap-add SYS_ADMIN); `crcli doctor` says what else is needed",
        )


def criu_command() -> list[str]:
    """Return the argv prefix that starts criu; raise HostLacks when there is none."""
    if named := os.environ.get("CRCLI_CRIU"):
        if not os.path.isfile(named) or not os.access(named, os.X_OK):
            raise HostLacks(f"CRCLI_CRIU names {named}, which cannot be executed")
        return [named]
    prefix = os.environ.get("CRCLI_CRIU_PREFIX") or DEFAULT_PREFIX
    if command := _from_prefix(prefix):
        return command
    import shutil  # with all that it can unpack: 2 ms that who has CRIU in a prefix need not wait for

    if found := shutil.which("criu", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        return [found]
    raise HostLacks(
        "CRIU is not installed here",
        hint="run scripts/install-criu, or install your distribution's criu 4.1 or newer",
    )


def _from_prefix(prefix: str) -> list[str] | None:
    binary = f"{prefix}/usr/sbin/criu"
    if not os.access(binary, os.X_OK):
        return None
    machine = os.uname().machine
    libraries = f"{prefix}/usr/lib/{machine}-linux-gnu"
    return [f"{libraries}/{_LOADERS.get(machine, 'ld.so')}", "--library-path", libraries, binary]


def knows_bpf() -> bool:
    """Whether this CRIU was built to save BPF maps: it then needs libbpf."""
    try:
        with open(criu_command()[-1], "rb") as file:
            return b"libbpf.so" in file.read()
    except (HostLacks, OSError):
        return False

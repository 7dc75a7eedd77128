"""Moves between two nodes of any kind, and the programs that are moved."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from tests.support.crcli import counter
from tests.support.nodes.base import Job, Node

MakeNode = Callable[[str], Node]

COUNTING_FAMILY = """
    import hashlib, itertools, os, random, time
    memory = random.Random({seed}).randbytes({kilobytes} << 10)
    ask, asked = os.pipe()
    answered, answer = os.pipe()
    if os.fork() == 0:
        while number := os.read(ask, 8):
            os.write(answer, hashlib.blake2b(memory, digest_size=8).digest())
        os._exit(0)
    print("ready")
    for number in itertools.count():
        os.write(asked, number.to_bytes(8, "big"))
        print(number, os.read(answered, 8).hex())
        time.sleep(0.01)
    """
"""Counts; its child says the hash of the memory that both have, through pipes."""

KEEPER_OF_FILES = """
    import hashlib, mmap, os, signal, sqlite3, time
    log = open("log", "a")
    print("written by the first node", file=log, flush=True)
    base = sqlite3.connect("base.db", isolation_level=None)
    base.execute("create table lines (text)")
    base.execute("insert into lines values ('committed')")
    base.execute("begin")
    base.execute("insert into lines values ('in progress')")
    deleted = open("deleted", "w+")
    deleted.write("nobody finds me")
    deleted.flush()
    os.unlink("deleted")
    shared = open("/dev/shm/shared", "w+b")
    shared.truncate(8192)
    memory = mmap.mmap(shared.fileno(), 8192)
    memory[:8] = b"mapped__"
    def tell(*_):
        base.execute("commit")
        print("written by the second node", file=log, flush=True)
        deleted.seek(0)
        rows = [text for (text,) in base.execute("select text from lines")]
        print(f"told {rows} {deleted.read()} {bytes(memory[:8])}")  # in one piece
    signal.signal(signal.SIGUSR1, tell)
    print("ready")
    while True:
        time.sleep(0.05)
    """
"""Has files of every kind; upon SIGUSR1 it ends its transaction and says what it finds in them."""

READER_OF_WEIGHTS = """
    import hashlib, os, sys, time
    with open(sys.argv[1] if len(sys.argv) > 1 else os.environ["MODEL"], "rb", buffering=0) as file:
        memory = bytearray(os.fstat(file.fileno()).st_size + 64)
        file.readinto(memoryview(memory)[64:])
    print("ready")
    number = 0
    while True:
        print(number, hashlib.blake2b(memory, digest_size=8).hexdigest())
        number += 1
        time.sleep(0.05)
    """
"""Reads the file that $MODEL names into memory of its own, and counts."""


def dedent(code: str) -> str:
    """A program's text without the indentation that it has here."""
    return "\n".join(line[4:] for line in code.splitlines())


def family(seed: int = 1, kilobytes: int = 512) -> str:
    """A program of two processes that counts."""
    return dedent(COUNTING_FAMILY).format(seed=seed, kilobytes=kilobytes)


def model(mebibytes: int) -> bytes:
    """Weights: random bytes."""
    return random.Random(7).randbytes(mebibytes << 20)


def dumped(job: Job, store: str, *options: str, code: int = 0) -> dict[str, Any]:
    """Dump a job on its node under its own name; return the report."""
    return job.node.crcli("dump", str(job.pid), "--name", job.name, "--store", store, *options, code=code)


def restored(job: Job, node: Node, store: str, *options: str, code: int = 0) -> dict[str, Any]:
    """Restore the newest image of a job on another node; return the report."""
    return node.crcli("restore", job.name, "--store", store, *options, code=code)


def move_a_family(source: Node, make_other: MakeNode, store: str, kilobytes: int = 512) -> Node:
    """A tree of two processes is dumped, its node destroyed; on another it counts on, its memory unchanged.

    Returns the other node, on which the tree (called `family`) runs.
    """
    job = source.launch("family", family(kilobytes=kilobytes))
    job.assert_goes_on()
    dumped(job, store)
    before = job.counted()
    source.kill()
    other = make_other("other")
    restored(job, other, store)
    job = job.on(other)
    assert job.counted()[: len(before)] == before
    job.assert_goes_on()
    return other


def move_files(source: Node, make_other: MakeNode, store: str) -> None:
    """What a tree wrote, has open, deleted or mapped travels in the image, onto the other's own disk."""
    job = source.launch("files", dedent(KEEPER_OF_FILES))
    source.write("/etc/files.conf", b"included")
    dumped(job, store, "--include", "/etc/files.conf")
    source.kill()
    other = make_other("other")
    assert other.run(f"ls {job.folder}").code != 0
    report = restored(job, other, store)
    job = job.on(other)
    other.run(f"kill -USR1 {report['host_pid']}", code=0)
    told = job.wait_for(lambda text: "told" in text)
    assert "told ['committed', 'in progress'] nobody finds me b'mapped__'" in told
    assert other.read(f"{job.folder}/log") == "written by the first node\nwritten by the second node\n"
    assert other.read("/etc/files.conf") == "included"


def digest_of(data: bytes) -> str:
    """The hash that READER_OF_WEIGHTS prints of these weights."""
    return hashlib.blake2b(bytes(64) + data, digest_size=8).hexdigest()


__all__ = ["MakeNode", "counter", "dumped", "family", "move_a_family", "move_files", "restored"]

"""Other users' limits reach the image without CAP_SYS_RESOURCE, and no failure leaves a tree held."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from pycriu.images.core_pb2 import core_entry

from crcli.criu.images import ImageFile
from crcli.criu.limits import with_limits_answered
from crcli.image.manifest import load
from crcli.image.names import parse_image
from crcli.image.packs import ChunkReader
from crcli.process.settings import RLIM64_INFINITY, read_limits
from crcli.store.open import open_store
from tests.support.crcli import COMMAND_LIMIT_SECONDS, wait_until
from tests.support.programs import Program, spawn_python

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)

TWO_USERS = """
    import os, resource, time
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (77, 88))
        os.setgid(1), os.setuid(1)
        while True: time.sleep(60)
    print(f"child={child}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (123, 456))
    resource.setrlimit(resource.RLIMIT_CORE, (4096, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_RTTIME, (10**12, 10**13))
    os.setgid(65534), os.setuid(65534)
    os.chdir("/")
    print("ready")
    for number in range(10**9):
        print(number)
        time.sleep(0.02)
    """

DUMP = """
    import json, sys
    from crcli.criu import limits
    from crcli.errors import DumpFailed
    from crcli.pipeline.dump import dump
    from crcli.pipeline.stages import DumpOptions, Outcome
    {before}
    options = DumpOptions(pid=int(sys.argv[1]), store=sys.argv[2], name="limits", outcome=Outcome.RUNNING)
    try:
        print(json.dumps({{"image": dump(options).image}}))
    except DumpFailed as error:
        print(json.dumps({{"error": str(error), "state": error.state.value}}))
    """


DIE_WHEN_ASKED = """
import os, signal

def answer(listener, id_, asker, address, data):
    frozen = "TracerPid:\\t0\\n" not in open(f"/proc/{sys.argv[1]}/status").read()
    if frozen:
        print(asker, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    write(listener, id_, asker, address, data)

write, limits._write = limits._write, answer
"""


def dump_without_sys_resource(pid: int, store: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Dump in a process of its own without CAP_SYS_RESOURCE; the code `before` runs first in it."""
    code = textwrap.dedent(DUMP).format(before=before)
    return subprocess.run(
        ["setpriv", "--bounding-set", "-sys_resource", sys.executable, "-c", code, str(pid), str(store)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_SECONDS,
    )


def limits_in_image(store_path: Path, image: str, pid: int) -> list[tuple[int, int]]:
    """Return the (soft, hard) limits that CRIU's core image of a process has, by number."""
    store = open_store(str(store_path))
    manifest = load(store, parse_image(image)[1])
    reader = ChunkReader(store, manifest.packs, manifest.chunks)
    file = next(file for file in manifest.skeleton if file.name == f"core-{pid}.img")
    data = b"".join(bytes(reader.blob([number])) for number in file.chunks)
    core = ImageFile.parse(data, core_entry).entries[0]
    return [(limit.cur, limit.max) for limit in core.tc.rlimits.rlimits]


def assert_goes_on(program: Program) -> None:
    """Assert that the program counts on, with no debugger on it."""
    before = program.output
    wait_until(lambda: program.output != before, "the program stands still")
    status = Path(f"/proc/{program.pid}/status")
    wait_until(lambda: "TracerPid:\t0\n" in status.read_text(), "CRIU holds the program")


def has_ended(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def seccomp_state() -> list[str]:
    """Return what /proc says about our own filters."""
    return [line for line in Path("/proc/self/status").read_text().splitlines() if "Seccomp" in line]


@contextmanager
def asking(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process whose questions are answered."""
    process = with_limits_answered(
        lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_dump_keeps_the_limits_of_a_tree_of_two_users(tmp_path: Path) -> None:
    """Each process's own limits are in its image, those that nobody changed too, and the tree runs on."""
    with spawn_python(TWO_USERS) as program:
        child = int(program.value_of("child"))
        done = dump_without_sys_resource(program.pid, tmp_path / "store")
        assert "image" in done.stdout, done.stdout + done.stderr
        image = json.loads(done.stdout)["image"]
        parents = limits_in_image(tmp_path / "store", image, program.pid)
        childs = limits_in_image(tmp_path / "store", image, child)
        assert_goes_on(program)
        assert childs == read_limits(child) and parents == read_limits(program.pid)
    assert parents[resource.RLIMIT_NOFILE] == (123, 456)
    assert parents[resource.RLIMIT_CORE] == (4096, RLIM64_INFINITY)
    assert parents[15] == (10**12, 10**13)  # RLIMIT_RTTIME
    assert childs[resource.RLIMIT_NOFILE] == (77, 88)


def test_a_tree_with_seccomp_filters_is_dumped_by_an_unfiltered_criu(tmp_path: Path) -> None:
    """CRIU gets no filter where it would stand in the way: a process of our own with filters is dumped."""
    code = """
        import ctypes, struct, time
        libc = ctypes.CDLL(None)
        allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))
        program = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(allow)))
        print("filtered" if libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, program) == 0 else "not filtered")
        print("ready")
        for number in range(10**9):
            print(number)
            time.sleep(0.02)
        """
    with spawn_python(code) as program:
        program.wait_for("filtered")
        done = dump_without_sys_resource(program.pid, tmp_path / "store")
        assert "image" in done.stdout, done.stdout + done.stderr
        assert_goes_on(program)


def test_a_dump_whose_questions_nobody_answers_fails_and_lets_go(tmp_path: Path) -> None:
    """With the listener closed the kernel answers ENOSYS; CRIU fails at once, and the tree runs."""
    with spawn_python(TWO_USERS) as program:
        nobody = "import os; limits._answer_all = os.close"
        done = dump_without_sys_resource(program.pid, tmp_path / "store", nobody)
        answer = json.loads(done.stdout)
        assert "Function not implemented" in answer["error"] and answer["state"] == "running"
        assert_goes_on(program)


def test_a_dump_killed_in_the_middle_of_a_question_lets_go(tmp_path: Path) -> None:
    """crcli is killed while CRIU waits for its answer: CRIU ends, and the tree runs."""
    with spawn_python(TWO_USERS) as program:
        done = dump_without_sys_resource(program.pid, tmp_path / "store", DIE_WHEN_ASKED)
        assert done.returncode == -signal.SIGKILL
        assert_goes_on(program)
        criu = int(done.stdout)
        wait_until(lambda: has_ended(criu), "CRIU waits for ever")


def test_proc_says_what_prlimit_says() -> None:
    """The order and the numbers of /proc/PID/limits are those of the system call."""
    asked = [resource.prlimit(os.getpid(), number) for number in range(16)]
    assert read_limits(os.getpid()) == [(soft % 2**64, hard % 2**64) for soft, hard in asked]


def test_other_calls_are_not_touched() -> None:
    """Setting limits, one's own limits and absent processes stay the kernel's business, for children too."""
    code = """if True:
        import os, resource
        resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (50, 60))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (50, 60)
        assert resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE) == (50, 60)
        if os.fork() == 0:
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 60))
            os._exit(resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE) != (50, 60))
        assert os.wait()[1] == 0
        try:
            resource.prlimit(2**22 + 1, resource.RLIMIT_CPU)
        except ProcessLookupError:
            print("fine")
        """
    with asking(code) as process:
        assert process.communicate(timeout=COMMAND_LIMIT_SECONDS)[0] == "fine\n"


def test_the_answering_ends_with_the_last_who_could_ask() -> None:
    """A grandchild that outlives its parent is still answered; then the thread ends; we have no filter."""
    code = f"""if True:
        import os, resource, time
        if os.fork() == 0:
            time.sleep(0.3)
            print(resource.prlimit({os.getpid()}, resource.RLIMIT_CORE)[0] >= -1, flush=True)
        """
    before = seccomp_state()
    with asking(code) as process:
        assert process.wait(10) == 0
        answering = [thread for thread in threading.enumerate() if thread.name == "limits"]
        assert len(answering) == 1
        assert process.communicate(timeout=COMMAND_LIMIT_SECONDS)[0] == "True\n"
        answering[0].join(5)
    assert not answering[0].is_alive()
    assert seccomp_state() == before

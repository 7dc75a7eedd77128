"""Preflight on real processes: each awkward state is named, and a plain program is not refused."""

from __future__ import annotations

import ctypes
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crcli import kernel
from crcli.errors import PreflightRefused
from crcli.findings import Finding, Severity
from crcli.pipeline.preflight import look_at
from crcli.process.evidence import Evidence
from crcli.process.gather import gather
from crcli.process.identity import ProcessId, identify, parse_stat
from crcli.process.preflight import preflight
from crcli.process.sharing import threads_apart
from crcli.process.tree import Tree, refuse_bad_target, scan_tree
from tests.support.frozen import frozen
from tests.support.programs import Program, spawn_python, then_wait


def look(pid: int) -> Evidence:
    """Return the evidence about the tree of a pid, as a dump gathers it."""
    return gather(scan_tree(refuse_bad_target(pid)))


def findings(pid: int) -> dict[str, Finding]:
    """Return the findings about the tree of a pid, by name."""
    return {finding.name: finding for finding in preflight(look(pid))}


def assert_blocked(found: dict[str, Finding], name: str) -> None:
    """Assert that exactly this finding stops the dump, and that it says what to do."""
    assert [one.name for one in found.values() if one.severity is Severity.BLOCKER] == [name]
    assert found[name].remedy and found[name].evidence


def needs(program: Program, name: str = "errno") -> None:
    """Skip when the program could not bring itself into the state, as a kernel or container may forbid."""
    errno = program.value_of(name)
    if errno != "0":
        pytest.skip(f"this kernel does not permit it: {os.strerror(int(errno))}")


# --- nothing special ---------------------------------------------------------------------------------------


def test_a_plain_program_has_nothing_to_say() -> None:
    """A session leader with its output in a file gets no blocker and no change, only its open file."""
    with spawn_python(then_wait()) as program:
        found = findings(program.pid)
    assert set(found) == {"files-written"}


def test_a_tree_of_ten_is_found_whole() -> None:
    """Ten idle processes are ten processes of the tree, and nothing stands against its dump."""
    code = """
        import os, time
        for _ in range(9):
            if os.fork() == 0:
                time.sleep(600)
        """
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        assert not [finding for finding in preflight(evidence) if finding.severity == Severity.BLOCKER]


def test_a_tree_knows_its_own() -> None:
    """Children, threads, sessions and command lines of the tree are as the program made them."""
    code = """
        import os, threading, time
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        """
    with spawn_python(then_wait(code)) as program:
        time.sleep(0.1)
        evidence = look(program.pid)
    root, child = evidence.tree.processes
    assert (root.pid, root.sid, root.threads) == (program.pid, program.pid, 2)
    assert (child.ppid, child.sid, child.threads) == (root.pid, child.pid, 1)
    assert root.argv[0] == sys.executable and root.exe == os.path.realpath(sys.executable)
    assert not evidence.foreign_sessions
    assert evidence.expected_bytes > 0 and evidence.threads == 3


# --- whom we refuse at once --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pid", "words"),
    [(1, "init"), (2, "kernel"), (1 << 22, "no process"), (os.getpid(), "crcli itself")],
    ids=["init", "kernel-thread", "nobody", "ourselves"],
)
def test_bad_targets_are_refused(pid: int, words: str) -> None:
    """Init, a kernel thread, nobody and crcli itself are refused with the reason."""
    if pid == 2 and Path("/proc/2/comm").read_text().strip() != "kthreadd":
        pytest.skip("kernel threads cannot be seen from this pid namespace")
    with pytest.raises(PreflightRefused, match=words) as caught:
        refuse_bad_target(pid)
    assert caught.value.exit_code == 10


def test_our_own_parent_is_refused() -> None:
    """A process that crcli descends from cannot be frozen by it."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path.cwd())!r})
        from crcli.errors import PreflightRefused
        from crcli.process.tree import refuse_bad_target
        try:
            refuse_bad_target({os.getpid()})
        except PreflightRefused as error:
            print("why=" + error.message)
        print("ready")
        """
    with spawn_python(code + "\n        import time; time.sleep(600)") as program:
        assert "inside the tree" in program.value_of("why")


def test_a_thread_is_no_process() -> None:
    """A thread id is refused, and the process that it belongs to is named."""
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    with spawn_python(then_wait(code)) as program:
        tid = max(int(name) for name in os.listdir(f"/proc/{program.pid}/task"))
        with pytest.raises(PreflightRefused, match=rf"thread of .* \({program.pid}\)"):
            refuse_bad_target(tid)


def test_a_zombie_is_refused() -> None:
    """A process that has ended and was not reaped cannot be dumped."""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(PreflightRefused, match="ended"):
        refuse_bad_target(child.pid)
    child.wait()


def test_a_traced_process_is_refused_and_the_tracer_named() -> None:
    """Who traces the target is named, since only one can."""
    with spawn_python(then_wait()) as target:
        code = f"""
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            result = libc.ptrace(0x4206, {target.pid}, 0, 0)
            print(f"errno={{ctypes.get_errno() if result < 0 else 0}}")
            """
        with spawn_python(then_wait(code)) as tracer:
            needs(tracer)
            with pytest.raises(PreflightRefused, match=rf"traced by .* \({tracer.pid}\)"):
                refuse_bad_target(target.pid)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_somebody_else_may_not_look() -> None:
    """Where the kernel shows nothing, the answer is a refusal with a hint, not a traceback."""
    with spawn_python(then_wait()) as program:
        child = os.fork()
        if not child:
            try:
                os.setuid(65534)
                findings(program.pid)
            except PreflightRefused as error:
                os._exit(0 if "root" in error.hint and "look into" in error.message else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_traced_child_blocks() -> None:
    """A tracer inside the tree blocks as well as one outside."""
    code = """
        import ctypes, os, time
        child = os.fork()
        if child == 0:
            time.sleep(600)
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.ptrace(0x4206, child, 0, 0)
        print(f"errno={ctypes.get_errno() if result < 0 else 0}")
        """
    with spawn_python(then_wait(code)) as program:
        needs(program)
        assert_blocked(findings(program.pid), "traced")


# --- what CRIU cannot take ---------------------------------------------------------------------------------


def test_io_uring_blocks() -> None:
    """A ring, which has no way into an image, is found by its descriptor."""
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        parameters = ctypes.create_string_buffer(120)
        result = libc.syscall(425, 4, parameters)
        print(f"errno={ctypes.get_errno() if result < 0 else 0}")
        """
    with spawn_python(then_wait(code)) as program:
        needs(program)
        assert_blocked(findings(program.pid), "io-uring")


def test_userfaultfd_blocks() -> None:
    """A program that handles its own page faults is refused."""
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.syscall(323, 0)
        print(f"errno={ctypes.get_errno() if result < 0 else 0}")
        """
    with spawn_python(then_wait(code)) as program:
        needs(program)
        assert_blocked(findings(program.pid), "userfaultfd")


def test_a_performance_counter_blocks() -> None:
    """An open performance counter is refused."""
    code = """
        import ctypes, struct
        libc = ctypes.CDLL(None, use_errno=True)
        attributes = ctypes.create_string_buffer(struct.pack("=IIQ", 1, 64, 0), 64)
        result = libc.syscall(298, attributes, 0, -1, -1, 0)
        print(f"errno={ctypes.get_errno() if result < 0 else 0}")
        """
    with spawn_python(then_wait(code)) as program:
        needs(program)
        assert_blocked(findings(program.pid), "perf-event")


def test_secret_memory_blocks() -> None:
    """Memory that nobody else may read is refused, also when only the mapping is left."""
    code = """
        import ctypes, mmap, os
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(447, 0)
        print(f"errno={ctypes.get_errno() if fd < 0 else 0}")
        if fd >= 0:
            os.ftruncate(fd, 4096)
            memory = mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED)
            os.close(fd)
        """
    with spawn_python(then_wait(code)) as program:
        needs(program)
        assert_blocked(findings(program.pid), "memfd-secret")


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun here")
def test_a_tun_interface_of_the_host_blocks() -> None:
    """A network interface in the host's namespace cannot be saved."""
    with spawn_python(then_wait("f = open('/dev/net/tun', 'r+b', buffering=0)")) as program:
        assert_blocked(findings(program.pid), "tun")


def test_a_pidfd_of_an_outsider_blocks_and_one_of_a_child_does_not() -> None:
    """A pidfd is fine as long as the process that it means is in the tree."""
    child = "import os, time\npid = os.fork()\nif pid == 0: time.sleep(600)\nfd = os.pidfd_open(pid)"
    with spawn_python(then_wait(child)) as program:
        assert "pidfd-outside" not in findings(program.pid)
    with spawn_python(then_wait(f"import os\nfd = os.pidfd_open({os.getpid()})")) as program:
        assert_blocked(findings(program.pid), "pidfd-outside")


def test_a_pipe_in_packet_mode_blocks() -> None:
    """The borders between packets in a pipe cannot be saved."""
    with spawn_python(then_wait("import os\nends = os.pipe2(os.O_DIRECT)")) as program:
        assert_blocked(findings(program.pid), "pipe-packets")


def test_an_mptcp_socket_blocks() -> None:
    """MPTCP, with which Go servers listen by default, is refused, with the setting that turns it off."""
    code = """
        import socket
        try:
            one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
            print("errno=0")
        except OSError as error:
            print(f"errno={error.errno}")
        """
    with spawn_python(then_wait(code)) as program:
        needs(program)
        found = findings(program.pid)
    assert_blocked(found, "socket-unsupported")
    assert "multipathtcp=0" in found["socket-unsupported"].remedy


SYSV_SHM = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0, 4096, 0o600)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    libc.shmctl(segment, 0, None)
    """


def test_sysv_memory_blocks_only_outside_an_ipc_namespace() -> None:
    """System V memory is refused where the whole host shares it, and taken in an IPC namespace."""
    code = then_wait(SYSV_SHM)
    with spawn_python(code) as program:
        assert_blocked(findings(program.pid), "sysv-shm")
    with spawn_python(code, before=("unshare", "--ipc")) as program:
        found = findings(program.pid)
    assert "sysv-shm" not in found and "ipc" in found["namespaces"].evidence["namespaces"]


WITH_SANDBOX = """
    import subprocess, sys, time
    child = subprocess.Popen(["unshare", "--{kind}", "sleep", "600"])
    while open(f"/proc/{{child.pid}}/comm").read() != "sleep\\n" and child.poll() is None:
        time.sleep(0.01)
    print(f"errno={{child.poll() or 0}}")
    """


@pytest.mark.parametrize("kind", ["net", "ipc", "uts", "mount", "user", "map-root-user"])
def test_a_child_in_its_own_namespace_blocks(kind: str) -> None:
    """A sandboxed child would be lost: CRIU does not even notice one in its own network namespace.

    What it may do in a user namespace, as root there, is nothing that crcli would have to have.
    """
    with spawn_python(then_wait(WITH_SANDBOX.format(kind=kind))) as program:
        needs(program)
        assert_blocked(findings(program.pid), "namespace-nested")


def test_a_child_with_mounts_of_its_own_blocks_below_another_such() -> None:
    """CRIU works inside the root's mount namespace, where the child's is a second: as below `crcli run`."""
    code = WITH_SANDBOX.format(kind="mount")
    with spawn_python(then_wait(code), before=("unshare", "--mount")) as program:
        needs(program)
        assert findings(program.pid)["namespace-nested"].severity is Severity.BLOCKER


def test_a_tree_in_its_own_network_namespace_is_not_refused() -> None:
    """A whole tree in one namespace is what CRIU can take; its sockets are asked for inside it."""
    code = "import socket\none = socket.create_server(('0.0.0.0', 4711))"
    with spawn_python(then_wait(code), before=("unshare", "--net")) as program:
        found = findings(program.pid)
    assert not [one for one in found.values() if one.severity is Severity.BLOCKER]
    assert found["tcp-listening"].evidence == {"addresses": ["0.0.0.0:4711"]}


def test_a_file_from_a_mount_namespace_that_was_left_blocks() -> None:
    """A program in its own mount namespace whose streams come from ours is refused."""
    with spawn_python(then_wait(), before=("unshare", "--mount")) as program:
        assert_blocked(findings(program.pid), "file-unreachable")


def test_a_pid_namespace_needs_its_init_and_a_session_of_its_own() -> None:
    """The first process of a pid namespace is refused while its session began outside, else taken."""
    code = "import time\nprint('ready')\ntime.sleep(600)"
    with spawn_python(code, before=("unshare", "--pid", "--fork")) as program:
        (init,) = look(program.pid).tree.processes[1:]
        assert_blocked(findings(init.pid), "session-outside-pid-namespace")
    with spawn_python("import os\nos.setsid()\n" + code, before=("unshare", "--pid", "--fork")) as program:
        (init,) = look(program.pid).tree.processes[1:]
        assert not [one for one in preflight(look(init.pid)) if one.severity is Severity.BLOCKER]


def test_a_vfork_parent_blocks() -> None:
    """A parent that waits inside vfork cannot be interrupted, and CRIU would wait for it in vain."""
    code = """
        import ctypes, threading, time
        libc = ctypes.CDLL(None)
        print("ready", flush=True)
        time.sleep(0.2)
        if libc.syscall(58) == 0:
            libc.sleep(600)
            libc._exit(0)
        """
    with spawn_python(code) as program:
        time.sleep(0.5)
        assert_blocked(findings(program.pid), "uninterruptible")


def test_a_program_in_a_frozen_cgroup_blocks() -> None:
    """CRIU would wait for it, for minutes."""
    with spawn_python(then_wait("")) as program:
        with frozen(program):
            assert_blocked(findings(program.pid), "uninterruptible")
        assert "uninterruptible" not in findings(program.pid)


def test_a_thread_inside_vfork_blocks_too() -> None:
    """It need not be the main thread that waits."""
    code = """
        import ctypes, threading, time
        libc = ctypes.CDLL(None)
        def wait():
            if libc.syscall(58) == 0:
                libc.sleep(600)
                libc._exit(0)
        threading.Thread(target=wait).start()
        """
    with spawn_python(then_wait(code)) as program:
        time.sleep(0.2)
        assert_blocked(findings(program.pid), "uninterruptible")


def test_a_process_without_its_first_thread_blocks() -> None:
    """A main thread that has ended while others run is refused, and not taken for a zombie."""
    code = """
        import ctypes, threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        print("ready")
        ctypes.CDLL(None).syscall(60, 0)
        """
    with spawn_python(code) as program:
        time.sleep(0.2)
        assert_blocked(findings(program.pid), "leader-exited")


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse here")
def test_a_device_blocks_but_dev_null_does_not() -> None:
    """A device whose state is in a driver is refused; those that are mere memory are not."""
    with spawn_python(then_wait("a = open('/dev/null'); b = open('/dev/urandom', 'rb')")) as program:
        assert "device" not in findings(program.pid)
    with spawn_python(then_wait("f = open('/dev/fuse', 'r+b', buffering=0)")) as program:
        assert_blocked(findings(program.pid), "device")


# --- what the tree will notice -----------------------------------------------------------------------------


def test_a_terminal_driven_from_outside_is_a_change() -> None:
    """A program on a terminal of ours is told apart, with who drives it."""
    master, slave = pty.openpty()
    try:
        code = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        with spawn_python(then_wait(code), stdin=slave) as program:
            evidence = look(program.pid)
            found = findings(program.pid)
        path = os.ttyname(slave)
    finally:
        os.close(master)
        os.close(slave)
    (terminal,) = evidence.outside_terminals
    assert terminal.path == path
    assert terminal.master is not None and terminal.master.pid == os.getpid()
    assert found["terminal-outside"].severity is Severity.CHANGE


def test_a_terminal_inside_the_tree_is_not_worth_a_word() -> None:
    """A program that drives its own terminal, like a terminal multiplexer, keeps it."""
    code = """
        import os, pty, time
        pid, master = pty.fork()
        if pid == 0:
            tty = open("/dev/tty")
            print("opened")
            time.sleep(600)
        os.read(master, 6)
        """
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
    assert {terminal.path for terminal in evidence.terminals} >= {"/dev/tty"}
    assert not evidence.outside_terminals


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_pipe_to_outside_is_a_change(stream: str) -> None:
    """A pipe whose other end we hold is found, in either direction, and we are named."""
    reader, writer = os.pipe()
    end = reader if stream == "stdin" else writer
    try:
        with spawn_python(then_wait(), ready_line="", **{stream: end}) as program:
            if stream == "stdout":
                os.read(reader, 6)
            else:
                program.wait_for("ready")
            (pipe,) = look(program.pid).outside_pipes
            found = findings(program.pid)["pipe-outside"]
    finally:
        os.close(reader)
        os.close(writer)
    assert bool(pipe.readers) == (stream == "stdin")
    assert os.getpid() in {other.pid for other in pipe.outsiders}
    assert found.evidence["pipe"] == pipe.criu_key


def test_pipes_inside_the_tree_and_broken_ones_are_no_change() -> None:
    """A pipe with both ends in the tree, or with no other end at all, is nothing to report."""
    with spawn_python(then_wait("import os\nends = os.pipe()\na, b = os.pipe()\nos.close(a)")) as program:
        evidence = look(program.pid)
    assert len(evidence.pipes) == 2 and not evidence.outside_pipes


def test_a_fifo_to_outside_is_told_by_its_path(tmp_path: Path) -> None:
    """A FIFO has a name under which it can be opened again."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    ours = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with spawn_python(then_wait(f"f = open({str(path)!r}, 'wb', buffering=0)")) as program:
            found = findings(program.pid)
    finally:
        os.close(ours)
    assert found["fifo-outside"].evidence["pipe"] == str(path)


def test_tcp_to_outside_is_a_change_and_says_where_to() -> None:
    """A connection to us is outside, with our address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\none = socket.create_connection(('127.0.0.1', {port}))"
        with spawn_python(then_wait(code)) as program:
            peer, _ = server.accept()
            found = findings(program.pid)
            peer.close()
    assert found["tcp-outside"].severity is Severity.CHANGE
    assert found["tcp-outside"].evidence["connections"][0]["remote"] == f"127.0.0.1:{port}"
    assert "tcp-inside" not in found


def test_tcp_inside_the_tree_is_only_a_note() -> None:
    """Both ends in the tree, in two processes, one in IPv6 clothes: the connection lives on."""
    code = """
        import os, socket, time
        server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        if os.fork() == 0:
            client = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
            time.sleep(600)
        accepted, _ = server.accept()
        """
    with spawn_python(then_wait(code)) as program:
        found = findings(program.pid)
    assert {"tcp-inside", "tcp-listening"} <= set(found)
    assert "tcp-outside" not in found


def test_a_connection_that_nobody_accepts_is_in_flight() -> None:
    """A listener with a connection waiting in its queue is told, as the connection will be dropped."""
    code = """
        import socket
        server = socket.create_server(("127.0.0.1", 0))
        print(f"port={server.getsockname()[1]}")
        """
    with spawn_python(then_wait(code)) as program:
        client = socket.create_connection(("127.0.0.1", int(program.value_of("port"))))
        found = findings(program.pid)
        client.close()
    assert found["tcp-in-flight"].severity is Severity.CHANGE


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_SEQPACKET"])
def test_a_unix_socket_to_outside_is_a_change_and_names_the_peer(kind: str, tmp_path: Path) -> None:
    """A connection to a daemon is told with the daemon's name and path."""
    path = tmp_path / "daemon.sock"
    with socket.socket(socket.AF_UNIX, getattr(socket, kind)) as server:
        server.bind(str(path))
        server.listen()
        code = f"from socket import *\none = socket(AF_UNIX, {kind})\none.connect({str(path)!r})"
        with spawn_python(then_wait(code)) as program:
            peer, _ = server.accept()
            (held,) = look(program.pid).outside_unix
            found = findings(program.pid)
            peer.close()
    assert held.peer is not None and held.peer.path == str(path)
    assert {other.pid for other in held.outsiders} == {os.getpid()}
    assert found["unix-outside"].evidence["peer_path"] == str(path)


def test_a_named_datagram_peer_is_only_a_note(tmp_path: Path) -> None:
    """A socket that sends to a path, as to syslog, is connected again without loss."""
    path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        code = f"from socket import *\none = socket(AF_UNIX, SOCK_DGRAM)\none.connect({str(path)!r})"
        with spawn_python(then_wait(code)) as program:
            found = findings(program.pid)
    assert found["unix-datagram-outside"].severity is Severity.NOTE
    assert "unix-outside" not in found


def test_a_socketpair_inside_the_tree_is_not_worth_a_word() -> None:
    """Both ends in the tree: nothing to report."""
    with spawn_python(then_wait("import socket\npair = socket.socketpair()")) as program:
        assert set(findings(program.pid)) == {"files-written"}


def test_a_daemonised_child_is_told() -> None:
    """A child that has left the tree but not the session will not be in the image."""
    code = """
        import os, time
        if os.fork() == 0:
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
        """
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        found = findings(program.pid)
    assert len(evidence.tree) == 1
    assert len(evidence.relatives) == 1
    assert found["relative-outside"].severity is Severity.CHANGE


def test_the_rest_of_a_pipeline_is_no_relative() -> None:
    """The neighbours in a shell's pipeline share the process group, and are not taken for daemons."""
    pipeline = "set -m; sleep 600 | cat >/dev/null; true"
    shell = subprocess.Popen(["bash", "-c", pipeline], start_new_session=True)
    try:
        app = _child_named(shell.pid, "sleep")
        evidence = look(app)
    finally:
        os.killpg(os.getpgid(app), signal.SIGKILL)
        shell.kill()
        shell.wait()
    assert not evidence.relatives
    assert [pipe.outsiders[0].comm for pipe in evidence.outside_pipes] == ["cat"]


def _child_named(parent: int, name: str) -> int:
    for _ in range(500):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if name in Path(f"/proc/{child}/comm").read_text():
                return int(child)
        time.sleep(0.01)
    raise AssertionError(f"{parent} never started {name}")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_bound_process_is_told() -> None:
    """CRIU does not save on which processors a process may run."""
    with spawn_python(then_wait("import os\nos.sched_setaffinity(0, {0})")) as program:
        assert findings(program.pid)["cpu-affinity"].evidence["processes"][0]["cpus"] == "0"


# --- what is worth knowing ---------------------------------------------------------------------------------


def test_deleted_files_are_counted(tmp_path: Path) -> None:
    """A file without a name is told with its size, open or merely mapped."""
    code = f"""
        import mmap, os
        os.chdir({str(tmp_path)!r})
        one, two = open("one", "w+b"), open("two", "w+b")
        one.truncate(10000), two.truncate(4096)
        memory = mmap.mmap(two.fileno(), 4096, access=mmap.ACCESS_READ)
        two.close()
        os.unlink("one"), os.unlink("two")
        """
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        found = findings(program.pid)
    assert sorted(file.size for file in evidence.deleted) == [4096, 10000]
    assert evidence.ghost_bytes == 14096
    assert "link-remap" not in found and len(found["deleted-files"].evidence["files"]) == 2


def test_a_semaphore_needs_a_link_remap() -> None:
    """glibc's named semaphores are mapped under a name that is gone, and kept under another."""
    code = "import multiprocessing as m\nm.set_start_method('spawn')\nlock = m.Lock()"
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
    (semaphore,) = evidence.deleted
    assert semaphore.path.startswith("/dev/shm/sem.") and semaphore.needs_link_remap


def test_a_mapped_file_with_another_name_needs_a_link_remap(tmp_path: Path) -> None:
    """A file that was mapped under one name and lives on under another is told."""
    code = f"""
        import mmap, os
        os.chdir({str(tmp_path)!r})
        one = open("one", "w+b")
        one.truncate(4096)
        memory = mmap.mmap(one.fileno(), 4096)
        os.link("one", "two"), os.unlink("one")
        """
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        assert "link-remap" in findings(program.pid)
    assert [(file.nlink, file.size) for file in evidence.deleted] == [(1, 4096)]
    assert evidence.ghost_bytes == 0


def test_files_in_memory_are_told() -> None:
    """A file in /dev/shm is not on any disk, so it must travel."""
    path = Path(f"/dev/shm/crcli-test-{os.getpid()}")
    try:
        with spawn_python(then_wait(f"f = open({str(path)!r}, 'w'); f.truncate(5000)")) as program:
            evidence = look(program.pid)
    finally:
        path.unlink(missing_ok=True)
    assert [(file.path, file.size) for file in evidence.in_memory_files] == [(str(path), 5000)]


@pytest.mark.parametrize(("how", "kind"), [("flock", "FLOCK"), ("lockf", "POSIX")])
def test_locks_are_told(how: str, kind: str, tmp_path: Path) -> None:
    """Both ways to lock a file are seen, once each."""
    path = tmp_path / "lock"
    code = f"import fcntl\nf = open({str(path)!r}, 'w')\nfcntl.{how}(f, fcntl.LOCK_EX)"
    with spawn_python(then_wait(code)) as program:
        (held,) = look(program.pid).locks
    assert (held.lock.kind, held.lock.mode, held.file.path) == (kind, "WRITE", str(path))


def test_sqlite_is_told_with_its_siblings(tmp_path: Path) -> None:
    """A database in WAL mode is told together with the files that belong to it."""
    path = tmp_path / "state.db"
    code = f"""
        import sqlite3
        db = sqlite3.connect({str(path)!r})
        db.execute("pragma journal_mode=wal"); db.execute("create table t (a)"); db.commit()
        """
    with spawn_python(then_wait(code)) as program:
        (database,) = look(program.pid).databases
    assert database.path == str(path)
    assert database.siblings == (f"{path}-wal", f"{path}-shm")


def test_files_of_the_kernel_are_not_taken_for_files() -> None:
    """What is open in /proc is neither saved nor read: reading it could take something away."""
    with spawn_python(then_wait("f = open('/proc/self/oom_score_adj', 'r+')")) as program:
        evidence = look(program.pid)
    assert {Path(file.path).name for file in evidence.written_files} == {"output"}


def test_looking_does_not_break_a_lease(tmp_path: Path) -> None:
    """Opening a leased file would signal its holder; preflight leaves it alone."""
    path = tmp_path / "leased"
    path.write_bytes(bytes(1024))
    code = f"""
        import fcntl, os, signal
        signal.signal(signal.SIGIO, lambda *_: print("broken"))
        fd = os.open({str(path)!r}, os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        """
    with spawn_python(then_wait(code)) as program:
        (held,) = look(program.pid).locks
        time.sleep(0.1)
        assert "broken" not in program.output
    assert held.lock.kind == "LEASE"


def test_a_job_of_a_shell_is_told() -> None:
    """A program that a shell started belongs to a session that stays behind."""
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nprint(f'child={child.pid}')"
    with spawn_python(then_wait(code)) as program:
        evidence = look(int(program.value_of("child")))
        assert [process.pid for process in evidence.foreign_sessions] == [evidence.root.pid]


def test_a_stopped_process_is_told() -> None:
    """A stopped process stays so."""
    with spawn_python(then_wait()) as program:
        os.kill(program.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
        found = findings(program.pid)
    assert found["stopped"].severity is Severity.NOTE


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_another_user_is_told_exactly_when_the_kernel_hides_limits() -> None:
    """Without CAP_SYS_RESOURCE a process of another user needs help; with it, it is like any other."""
    with spawn_python(then_wait("import os\nos.setgid(65534)\nos.setuid(65534)")) as program:
        evidence = look(program.pid)
        found = findings(program.pid)
    assert ("other-user" in found) == evidence.viewer.lacks_sys_resource


def test_a_zombie_child_is_no_obstacle() -> None:
    """A child that waits to be reaped is in the tree and stops nothing."""
    code = """
        import os
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        """
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        found = findings(program.pid)
    assert [process.is_zombie for process in evidence.tree] == [False, True]
    assert not [one for one in found.values() if one.severity is Severity.BLOCKER]


def test_what_is_over_in_a_moment_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hint would say, to try again, is done first."""
    code = """
        import signal, socket
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.connect(("127.0.0.1", 9))
        one.setsockopt(socket.IPPROTO_UDP, 1, 1)
        one.send(b"held back")
        def send(*_):
            one.setsockopt(socket.IPPROTO_UDP, 1, 0)
            print("sent")
        signal.signal(signal.SIGUSR1, send)
        """
    with spawn_python(then_wait(code)) as program:

        def gather_first(tree: Tree) -> Evidence:
            found = gather(tree)
            os.kill(program.pid, signal.SIGUSR1)
            program.wait_for("sent")
            return found

        assert "udp-corked" in {one.name for one in preflight(look(program.pid))}
        monkeypatch.setattr("crcli.pipeline.preflight.gather", gather_first)
        _, found = look_at(refuse_bad_target(program.pid))
    assert not [one.name for one in found if one.severity is Severity.BLOCKER]


def test_a_child_that_is_born_while_we_look_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent holds a pidfd of it, and it is not in the list of processes that was made before."""
    code = """
        import os, signal, subprocess
        kept = []
        def start(*_):
            child = subprocess.Popen(["sleep", "1000"])
            kept.append((child, os.pidfd_open(child.pid)))
            print("started")
        signal.signal(signal.SIGUSR1, start)
        """
    with spawn_python(then_wait(code)) as program:

        def scan_first(root: ProcessId) -> Tree:
            tree = scan_tree(root)
            os.kill(program.pid, signal.SIGUSR1)
            program.wait_for("started")
            return tree

        monkeypatch.setattr("crcli.pipeline.preflight.scan_tree", scan_first)
        evidence, found = look_at(refuse_bad_target(program.pid))
        assert len(evidence.tree) == 1 and evidence.anon("pidfd")
    assert not [one.name for one in found if one.severity is Severity.BLOCKER]


def test_a_thread_that_is_ending_is_not_apart() -> None:
    """It has let go of its files, and is seen until whoever traces it has looked."""
    code = """
        import signal, threading
        go = threading.Event()
        thread = threading.Thread(target=go.wait)
        thread.start()
        signal.signal(signal.SIGUSR1, lambda *_: go.set())
        """
    with spawn_python(then_wait(code)) as program:
        (tid,) = (int(name) for name in os.listdir(f"/proc/{program.pid}/task") if int(name) != program.pid)
        trace = ctypes.CDLL(None, use_errno=True).ptrace
        assert trace(0x4206, tid, None, None) == 0  # PTRACE_SEIZE
        try:
            os.kill(program.pid, signal.SIGUSR1)
            while parse_stat(Path(f"/proc/{program.pid}/task/{tid}/stat").read_bytes()).state != "Z":
                time.sleep(0.01)
            assert not kernel.shares(program.pid, tid, kernel.KCMP_FILES)
            assert threads_apart(scan_tree(identify(program.pid))) == ()
        finally:
            os.waitpid(tid, 0x40000000)  # __WALL: it is no child

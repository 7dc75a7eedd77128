"""Programs that people run and nobody here wrote: dumped, killed, restored, and found as they were."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from pwd import getpwnam

import psutil
import pytest

from tests.support.crcli import Crcli, launched, reap, tree_of, wait_until
from tests.support.programs import Program, spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def need(*names: str) -> str:
    """Return the path of the first of these programs that is installed; skip the test when none is."""
    for name in names:
        if found := shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"):
            return found
    pytest.skip(f"{' or '.join(names)} is not installed")


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def connect(port: int) -> socket.socket:
    """Return a connection to a server that may still be starting."""
    found: list[socket.socket] = []

    def tried() -> bool:
        try:
            found.append(socket.create_connection(("127.0.0.1", port), timeout=20))
        except OSError:
            return False
        return True

    wait_until(tried, f"nobody listens on {port}", 30)
    return found[0]


def get(port: int, path: str = "/") -> str:
    """Return the body of an HTTP answer of a server that may still be starting."""
    bodies: list[str] = []

    def answered() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
                bodies.append(answer.read().decode())
        except urllib.error.URLError:
            return False
        return True

    wait_until(answered, f"no answer on {port}", 30)
    return bodies[0]


# --- redis -------------------------------------------------------------------------------------------------


class Redis:
    """A client that speaks Redis' protocol over one connection."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port)
        self.file = self.socket.makefile("rb")

    def ask(self, *words: str) -> str:
        """Send one command, and return its answer: a status, a number or a text."""
        parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
        self.socket.sendall("".join(parts).encode())
        line = self.file.readline().decode().strip()
        return self.file.read(int(line[1:]) + 2)[:-2].decode() if line[:1] == "$" else line[1:]


def redis_command(port: int) -> list[str]:
    """Return how a Redis that never writes to disk is started."""
    server = need("redis-server", "valkey-server")
    return [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]


def test_redis_keeps_its_data_and_its_client(crcli: Crcli, tmp_path: Path) -> None:
    """20000 keys are there again, and a client outside goes on over the connection that it had."""
    port = free_port()
    with launched(redis_command(port), tmp_path) as program:
        client = Redis(port)
        assert client.ask("DEBUG", "POPULATE", "20000", "key", "100").startswith(("OK", "ERR"))
        for number in range(200):
            client.ask("SET", f"mine:{number}", f"value {number}" * 10)
        assert client.ask("INCR", "counter") == "1"
        size = client.ask("DBSIZE")
        image = crcli.dump(program.pid)["image"]
        crcli.restore(image)
        assert client.ask("INCR", "counter") == "2"
        assert client.ask("DBSIZE") == size
        assert client.ask("GET", "mine:150") == "value 150" * 10
        assert Redis(port).ask("INCR", "counter") == "3"


def test_redis_with_its_client_in_one_tree(crcli: Crcli, tmp_path: Path) -> None:
    """A program that started a Redis of its own talks on with it, without an answer lost."""
    port = free_port()
    code = f"""
        import socket, subprocess, time
        subprocess.Popen({redis_command(port)!r}, stdout=subprocess.DEVNULL)
        while True:
            try:
                peer = socket.create_connection(("127.0.0.1", {port}))
                break
            except OSError:
                time.sleep(0.05)
        answers = peer.makefile("rb")
        print("ready")
        while True:
            peer.sendall(b"INCR counter\\r\\n")
            print("number=" + answers.readline()[1:].decode().strip())
            time.sleep(0.005)
        """
    with spawn_python(code) as program:
        wait_until(lambda: "number=20" in program.output, "the client stands still")
        assert crcli.move(program.pid)["processes"] == 2
        before = int(program.value_of("number"))
        wait_until(
            lambda: int(program.value_of("number")) > before + 20, "the client stands still afterwards"
        )
        numbers = [line[7:] for line in program.output.splitlines() if line.startswith("number=")]
        assert numbers == [str(number + 1) for number in range(len(numbers))]


# --- nginx -------------------------------------------------------------------------------------------------

NGINX = """
daemon off;
worker_processes 2;
user nobody nogroup;
pid {folder}/pid;
error_log {folder}/errors;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access;
    keepalive_timeout 600;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "hello $connection_requests"; }}
    }}
}}
"""


def test_nginx_with_workers_of_another_user(crcli: Crcli, tmp_path: Path) -> None:
    """A root master and two workers of nobody's serve on, also over a connection that was open."""
    nginx, port = need("nginx"), free_port()
    (tmp_path / "conf").write_text(NGINX.format(folder=tmp_path, port=port))
    with launched([nginx, "-p", str(tmp_path), "-c", str(tmp_path / "conf")], tmp_path) as program:
        assert get(port) == "hello 1"
        with connect(port) as client:
            assert "hello 1" in keep_alive(client)
            report = crcli.move(program.pid)
            assert report["processes"] == 3
            assert "hello 2" in keep_alive(client)
        users = [process.uids().real for process in tree_of(report["host_pid"])]
        assert users == [0, getpwnam("nobody").pw_uid, getpwnam("nobody").pw_uid]
        assert get(port) == "hello 1"
        log = tmp_path / "access"  # written after the answer
        wait_until(lambda: len(log.read_text().splitlines()) == 4, "a request was not logged")


def test_nginx_is_dumped_again_from_a_namespace_of_its_own(crcli: Crcli, tmp_path: Path) -> None:
    """From a pid namespace of its own it is dumped from outside, its workers' limits included."""
    nginx, port = need("nginx"), free_port()
    (tmp_path / "conf").write_text(NGINX.format(folder=tmp_path, port=port))
    with launched([nginx, "-p", str(tmp_path), "-c", str(tmp_path / "conf")], tmp_path) as program:
        assert get(port) == "hello 1"
        inside = crcli.restore(crcli.dump(program.pid)["image"], "--pid-namespace", "new")
        assert get(port) == "hello 1"
        again = crcli.dump(inside["host_pid"])
        reap(crcli.restored)
        assert crcli.restore(again["image"])["processes"] == 3
        assert get(port) == "hello 1"


def keep_alive(client: socket.socket) -> str:
    """Return the answer to one request over an open connection."""
    client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    return client.recv(4096).decode()


# --- PostgreSQL --------------------------------------------------------------------------------------------


@contextmanager
def postgres(folder: Path, before: tuple[str, ...] = ()) -> Iterator[tuple[Program, int]]:
    """A PostgreSQL of user postgres' own, started with the command `before` in front, and its port."""
    homes = sorted(glob("/usr/lib/postgresql/*/bin"))
    if not homes:
        pytest.skip("postgresql is not installed")
    need("setpriv")
    with tempfile.TemporaryDirectory(prefix="crcli-postgres-") as name:
        shutil.chown(name, "postgres", "postgres")
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        made = [f"{homes[-1]}/initdb", "-D", f"{name}/data", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*user, *made], cwd="/", check=True, capture_output=True, timeout=60)
        port = free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": name,
            "shared_memory_type": "mmap",
            "dynamic_shared_memory_type": "posix",
            "shared_buffers": "4MB",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        command = [*before, *user, f"{homes[-1]}/postgres", "-D", f"{name}/data", *options]
        with launched(command, folder, cwd="/") as program:
            connect(port).close()
            wait_until(lambda: len(tree_of(program.pid)) >= 6, "its helpers are late")
            yield program, port


class Psql:
    """A psql that stays connected."""

    def __init__(self, port: int) -> None:
        command = [need("psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-qAtX"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ask(self, statement: str) -> list[str]:
        """Return the rows (and complaints) that a statement gives."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{statement};\n\\echo done\n")
        self.process.stdin.flush()
        rows = []
        while (line := self.process.stdout.readline()) and line != "done\n":
            rows.append(line.strip())
        return rows

    def __enter__(self) -> Psql:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_postgres_finishes_the_transaction_of_its_client(crcli: Crcli, tmp_path: Path) -> None:
    """In an IPC namespace of its own, PostgreSQL goes on in the middle of a transaction."""
    with postgres(tmp_path, ("unshare", "--ipc")) as (program, port), Psql(port) as client:
        assert client.ask("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n") == []
        assert client.ask("BEGIN") == client.ask("INSERT INTO t VALUES (1001)") == []
        report = crcli.dump(program.pid)
        assert report["processes"] >= 7
        crcli.restore(report["image"])
        assert client.ask("INSERT INTO t VALUES (1002)") == client.ask("COMMIT") == []
        with Psql(port) as another:
            assert another.ask("SELECT count(*), max(n) FROM t") == ["1002|1002"]


def test_postgres_without_an_ipc_namespace_is_refused(crcli: Crcli, tmp_path: Path) -> None:
    """Its small SysV segment cannot be taken out of the host's IPC namespace: the finding says what helps."""
    with postgres(tmp_path) as (program, port):
        error = crcli.dump(program.pid, code=10)["error"]
        assert [finding["name"] for finding in error["findings"] if finding["severity"] == "blocker"] == [
            "sysv-shm"
        ]
        assert "unshare" in error["hint"]
        with Psql(port) as client:
            assert client.ask("SELECT 1") == ["1"]


# --- node, java, shells ------------------------------------------------------------------------------------

NODE = """
const http = require('http'), { fork } = require('child_process')
if (process.argv[2] === 'child') {
  let asked = 0
  process.on('message', word => process.send(`${word} ${++asked}`))
} else {
  const child = fork(__filename, ['child']), waiting = []
  child.on('message', text => waiting.shift()(text))
  let ticks = 0
  setInterval(() => ticks++, 5)
  http.createServer((request, response) => {
    waiting.push(text => response.end(`${text} ${ticks}`))
    child.send('asked')
  }).listen(+process.argv[2], '127.0.0.1')
}
"""


def test_node_with_a_child(crcli: Crcli, tmp_path: Path) -> None:
    """A Node server, its child behind a channel and its timer go on where they were."""
    node, port = need("node", "nodejs"), free_port()
    (tmp_path / "server.js").write_text(NODE)
    without = os.environ | {"UV_USE_IO_URING": "0"}
    with launched([node, str(tmp_path / "server.js"), str(port)], tmp_path, env=without) as program:
        assert get(port).startswith("asked 1 ")
        before = int(get(port).split()[-1])
        assert crcli.move(program.pid)["processes"] == 2
        word, asked, ticks = get(port).split()
        assert (word, asked) == ("asked", "3") and int(ticks) > before
        wait_until(lambda: int(get(port).split()[-1]) > int(ticks), "the timer stands still")


def test_java_serves_on(crcli: Crcli, tmp_path: Path) -> None:
    """A Java server (rmiregistry: dozens of threads) answers over an open connection, and to a new one."""
    need("java")
    registry, port = need("rmiregistry"), free_port()
    heap = ["-J-Xmx64m", "-J-XX:+UseSerialGC"]
    with launched([registry, *heap, str(port)], tmp_path) as program:
        with rmi_connection(port) as client:
            assert rmi_ping(client)
            crcli.move(program.pid)
            assert rmi_ping(client)
        with rmi_connection(port) as client:
            assert rmi_ping(client)


def rmi_connection(port: int) -> socket.socket:
    """Return a connection over which Java's RMI protocol was agreed upon."""
    client = connect(port)
    client.sendall(b"JRMI\0\2K")
    assert client.recv(1) == b"N"
    client.recv(200)
    client.sendall(b"\0\0\0\0\0\0")
    return client


def rmi_ping(client: socket.socket) -> bool:
    """Whether the other side answers a ping."""
    client.sendall(b"R")
    return client.recv(1) == b"S"


SHELL = """
trap 'echo asked $count' USR1
( while sleep 0.02; do echo line; done ) | while read -r line; do echo "number=$((++read))"; done &
sleep 1000 &
count=0
echo ready
while true; do
    count=$((count + 1))
    sleep 0.02
done
"""


def test_bash_with_children_and_a_pipeline(crcli: Crcli, tmp_path: Path) -> None:
    """A shell script with background jobs and a pipeline goes on, its variables, jobs and trap intact."""
    bash = need("bash")
    with launched([bash, "-c", SHELL], tmp_path) as program:
        wait_until(lambda: "number=5" in program.output, "the pipeline stands still")
        report = crcli.move(program.pid)
        assert report["processes"] >= 5
        before = int(program.value_of("number"))
        wait_until(
            lambda: int(program.value_of("number")) > before + 5, "the pipeline stands still afterwards"
        )
        psutil.Process(report["host_pid"]).send_signal(10)
        wait_until(lambda: "asked" in program.output, "the trap is gone")
        assert int(program.output.partition("asked ")[2].split()[0]) > 5
        names = sorted(process.name() for process in tree_of(report["host_pid"]))
        assert names.count("bash") >= 3 and "sleep" in names


def test_tail_follows_on(crcli: Crcli, tmp_path: Path) -> None:
    """`tail -f FILE | grep` shows what is added to the file after the restore, with nothing lost between."""
    path = tmp_path / "followed"
    path.write_text("line 0\n")
    pipeline = f"{need('tail')} -f -n +1 {path} | {need('grep')} --line-buffered line"
    with launched([need("bash"), "-c", pipeline], tmp_path) as program:
        wait_until(lambda: "line 0" in program.output, "nothing comes")
        image = crcli.dump(program.pid)["image"]
        with path.open("a") as file:
            file.write("line 1\n")
        assert "file-grown" in {finding["name"] for finding in crcli.restore(image)["findings"]}
        with path.open("a") as file:
            file.write("line 2\n")
        wait_until(lambda: program.output == "line 0\nline 1\nline 2\n", f"it shows {program.output!r}")


# --- Python with native code -------------------------------------------------------------------------------

NUMPY = """
    import hashlib, numpy
    state = numpy.random.default_rng(1).random((400, 400))
    print("ready")
    for step in range(10**6):
        state = numpy.tanh(state @ state.T / 100)
        print(step, hashlib.blake2b(state.tobytes(), digest_size=8).hexdigest())
    """

TORCH = """
    import torch
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters())
    print("ready")
    for step in range(10**6):
        batch = torch.randn(32, 64)
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        print(step, loss.item().hex())
    """


def steps(program: Program) -> list[str]:
    """Return the whole lines of steps that a program has printed."""
    return program.output.rpartition("\n")[0].partition("ready\n")[2].splitlines()


@pytest.mark.parametrize(("library", "code"), [("numpy", NUMPY), ("torch", TORCH)])
def test_a_computation_goes_on_bit_by_bit(crcli: Crcli, library: str, code: str) -> None:
    """A computation that was moved gives what an undisturbed one gives, to the last bit."""
    if find_spec(library) is None:
        pytest.skip(f"{library} cannot be imported here")
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    with spawn_python(code, env=os.environ | threads) as moved:
        wait_until(lambda: len(steps(moved)) > 20, "it does not start", 60)
        crcli.move(moved.pid)
        enough = len(steps(moved)) + 50
        wait_until(lambda: len(steps(moved)) > enough, "it stands still after the restore", 60)
        found = steps(moved)[:enough]
    with spawn_python(code, env=os.environ | threads) as undisturbed:
        wait_until(lambda: len(steps(undisturbed)) > enough, "the other one stands still", 60)
        assert steps(undisturbed)[:enough] == found

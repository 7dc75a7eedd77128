"""Real S3 servers on loopback, each in a process of its own, for tests and benchmarks.

    with start_moto() as server:
        subprocess.run([..., "--store", server.url("images")], env=os.environ | server.env)

moto is quick and believes everybody; Swift enforces signatures and digests. Both listen on a random port (of
127.0.0.1, if not told otherwise), hold one bucket, and are gone with `close` (or with whoever started them).
"""

from __future__ import annotations

import http.client
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

READY_S = 30
BUCKET = "crcli-test"
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class S3Server:
    """A server that runs, and how to reach it.

    `env` holds the AWS_* variables with which any S3 client (this process's or a subprocess's) finds it; the
    variables of the caller's own environment that would get in the way are in it too, set to nothing of use.
    """

    endpoint_url: str
    bucket: str
    env: dict[str, str]
    ca_bundle: str | None
    process: subprocess.Popen[str]
    folder: Path
    _closed: bool = field(default=False, repr=False)

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self.endpoint_url.rpartition(":")[2])

    def url(self, prefix: str = "") -> str:
        """The URL of a store in the bucket, to be used together with `env`."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/")

    def client(self, **overrides: Any) -> Any:
        """A bare boto3 client, to look at the server behind crcli's back."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            verify=self.ca_bundle,
            **overrides,
        )

    def empty(self) -> None:
        """Have moto forget all that it stores; the bucket is there, as when it started."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("POST", "/moto-api/reset")
            assert connection.getresponse().status == 200
        finally:
            connection.close()
        self.client().create_bucket(Bucket=self.bucket)

    def close(self) -> None:
        """Kill the server and remove what it stored."""
        if self._closed:
            return
        self._closed = True
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_moto(tls: bool = False, *, conditions: str = "honoured", address: str = "127.0.0.1") -> S3Server:
    """Start moto; `conditions` is `honoured`, `ignored` or `refused` (see moto_server.py).

    With another `address`, one of this thread's network, machines of a test (tests/support/nodes) reach it.
    """
    arguments = [conditions, address]
    return _start("tests.support.moto_server", arguments, tls, "anyone", "anything", address=address)


def start_swift(tls: bool = False) -> S3Server:
    """Start OpenStack Swift (pip: swift, PyECLib)."""
    folder = Path(tempfile.mkdtemp(prefix="crcli-swift-", dir=_folder_with_attributes()))
    return _start("tests.support.swift_server", [str(folder)], tls, "test:tester", "testing", folder)


def _start(
    module: str,
    arguments: list[str],
    tls: bool,
    access_key: str,
    secret_key: str,
    folder: Path | None = None,
    address: str = "127.0.0.1",
) -> S3Server:
    folder = folder or Path(tempfile.mkdtemp(prefix="crcli-moto-"))
    ca_bundle, certificate = _make_certificate(folder) if tls else (None, [])
    log = folder / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *certificate],
            cwd=ROOT,
            env=os.environ | {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        port = _read_port(process, log)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    endpoint_url = f"{'https' if tls else 'http'}://{address}:{port}"
    env = {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": address,
    }
    if ca_bundle:
        env["AWS_CA_BUNDLE"] = ca_bundle
    server = S3Server(endpoint_url, BUCKET, env, ca_bundle, process, folder)
    try:
        server.client().create_bucket(Bucket=BUCKET)
    except BaseException:
        server.close()
        raise
    return server


def _folder_with_attributes() -> str:
    """A folder whose file system keeps user attributes, in which Swift stores what it knows of an object."""
    for folder in (tempfile.gettempdir(), "/var/tmp", str(ROOT)):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            try:
                os.setxattr(file.name, "user.crcli", b"x")
            except OSError:
                continue
            return folder
    raise RuntimeError("Swift needs a file system with user attributes (xattr)")


def _read_port(process: subprocess.Popen[str], log: Path) -> int:
    """Wait until the server says where it listens; its log tells why if it does not."""
    assert process.stdout is not None
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.2)[0]:
            line = process.stdout.readline().strip()
            if line.isdigit():
                return int(line)
            break  # it has closed its output: it is dead
    process.kill()
    process.wait()
    raise RuntimeError(f"{process.args} did not start within {READY_S} s:\n{log.read_text()[-4000:]}")


def _make_certificate(folder: Path) -> tuple[str, list[str]]:
    """A throwaway authority and a certificate of 127.0.0.1 that it signed; returns their paths."""
    import trustme

    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(folder / "key.pem"))
    return str(folder / "ca.pem"), [str(folder / "cert.pem"), str(folder / "key.pem")]

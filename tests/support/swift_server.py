"""OpenStack Swift with its S3 API in one process: `python -m tests.support.swift_server FOLDER [CERT KEY]`.

A real object server that enforces signatures, digests and conditional writes. Prints the port of its S3 API
when it is ready. Its data lies below FOLDER, which must be on a file system with user xattrs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import eventlet

eventlet.monkey_patch()

SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = crcli
[storage-policy:0]
name = only
default = yes
"""

BACKEND_CONF = """
[DEFAULT]
devices = {folder}/devices
mount_check = false
swift_dir = {folder}
log_level = ERROR
[app:main]
use = egg:swift#{kind}
fallocate_reserve = 0
"""

PROXY_CONF = """
[DEFAULT]
swift_dir = {folder}
log_level = ERROR
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


def write(path: Path, text: str) -> Path:
    """Write a configuration file and return its path."""
    path.write_text(text)
    return path


def make_ring(folder: Path, kind: str, port: int) -> None:
    """Write the ring of `kind`: all of it on one device, behind `port`."""
    from swift.common.ring import RingBuilder

    builder = RingBuilder(1, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": port, "device": "d"})
    builder.rebalance()
    builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


def serve(sock: eventlet.greenio.GreenSocket, conf: Path) -> None:
    """Serve the application that `conf` describes, in a green thread."""
    import logging

    from swift.common.http_protocol import SwiftHttpProtocol
    from swift.common.wsgi import loadapp

    eventlet.spawn(
        eventlet.wsgi.server,
        sock,
        loadapp(str(conf), global_conf={"log_name": conf.stem}),
        logging.getLogger(conf.stem),
        protocol=SwiftHttpProtocol,
        capitalize_response_headers=False,
        log_output=False,
    )


def main(folder: Path, tls: list[str]) -> None:
    """Start three back ends and the proxy, say where, and serve until whoever started us is gone."""
    starter = os.getppid()
    from swift.common import utils

    (folder / "devices" / "d").mkdir(parents=True, exist_ok=True)
    utils.SWIFT_CONF_FILE = str(write(folder / "swift.conf", SWIFT_CONF))
    utils.validate_configuration()
    for kind in ("account", "container", "object"):
        sock = eventlet.listen(("127.0.0.1", 0))
        make_ring(folder, kind, sock.getsockname()[1])
        serve(sock, write(folder / f"{kind}.conf", BACKEND_CONF.format(folder=folder, kind=kind)))
    sock = eventlet.listen(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    if tls:
        sock = eventlet.wrap_ssl(sock, certfile=tls[0], keyfile=tls[1], server_side=True)
    serve(sock, write(folder / "proxy.conf", PROXY_CONF.format(folder=folder)))
    print(port, flush=True)
    while os.getppid() == starter:
        eventlet.sleep(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""A file system of one file, served over FUSE by this very script: `python fuse_server.py MOUNTPOINT`.

It speaks just enough of the kernel's protocol (linux/fuse.h, 7.31) for `hello` to be opened and read. The
mount ends with the process. It prints `mounted`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys

CONTENT = b"hello from fuse\n"
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _FLUSH = 26, 27, 28, 29, 36, 25
_ROOT, _FILE = 1, 2
_HEADER = struct.Struct("=IIQQIIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_MNT_DETACH = 2


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
    size = 0 if node == _ROOT else len(CONTENT)
    return struct.pack("=QQQQQQIIIIIIIIII", node, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(code: int, node: int, body: bytes) -> bytes | int:
    """Return the answer's body, or an error number."""
    if code == _INIT:
        return _INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, 0)
    if code == _GETATTR:
        return struct.pack("=QII", 1, 0, 0) + _attributes(node)
    if code == _LOOKUP:
        if body.rstrip(b"\0") != b"hello":
            return errno.ENOENT
        return struct.pack("=QQQQII", _FILE, 0, 1, 1, 0, 0) + _attributes(_FILE)
    if code in (_OPEN, _OPENDIR):
        return struct.pack("=QII", 0, 0, 0)
    if code == _READ:
        _, offset, size = struct.unpack_from("=QQI", body)
        return CONTENT[offset : offset + size]
    if code == _STATFS:
        return struct.pack("=QQQQQIIII24x", 1, 1, 1, 2, 2, 4096, 255, 4096, 0)
    if code in (_READDIR, _RELEASE, _RELEASEDIR, _FLUSH):
        return b""
    return errno.ENOSYS


def serve(device: int) -> None:
    """Answer until the file system is unmounted."""
    while True:
        try:
            request = os.read(device, 1 << 17)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            raise
        _, code, unique, node, *_ = _HEADER.unpack_from(request)
        if code in (_FORGET, _INTERRUPT):
            continue
        answer = _answer(code, node, request[_HEADER.size :])
        body, number = (b"", answer) if isinstance(answer, int) else (answer, 0)
        os.write(device, struct.pack("=IiQ", 16 + len(body), -number, unique) + body)


def main(point: str) -> None:
    """Mount at `point`, say so, and serve."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"crcli-test", point.encode(), b"fuse.hello", 6, options.encode()):
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    print("mounted", flush=True)
    try:
        serve(device)
    finally:
        libc.umount2(point.encode(), _MNT_DETACH)


if __name__ == "__main__":
    main(sys.argv[1])

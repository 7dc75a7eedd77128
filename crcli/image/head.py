"""The JSON head of a manifest: what stands in each of its fields, looked at before anybody reads one.

A seal proves that nothing was damaged, and not that a dump wrote it. FORMAT.md says what the fields mean.
"""

from __future__ import annotations

import json
import math
import re
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged
from crcli.image.names import is_id

if TYPE_CHECKING:
    from collections.abc import Callable

    Shape = Callable[[Any], bool] | dict[str | EllipsisType, "Shape"] | list["Shape"] | tuple["Shape", ...]

_CPUS = re.compile(r"(\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*)?", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CGROUP = re.compile(r"\d+:[^:\n]*:[^\n]*", re.ASCII)


def _text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _path(value: Any) -> bool:
    return _text(value) and "\0" not in value


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(least: int, bits: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 1 << bits


_number = _whole(-1, 63)
_size = _whole(0, 63)
_mode = _whole(0, 32)
_id = _whole(0, 32)
_pid = _whole(0, 31)


def _time(value: Any) -> bool:
    """Seconds or milliseconds that can be shown."""
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1 << 48


def _cpus(value: Any) -> bool:
    return isinstance(value, str) and _CPUS.fullmatch(value) is not None


def _image_id(value: Any) -> bool:
    return isinstance(value, str) and is_id(value)


def _digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _cgroup(value: Any) -> bool:
    return _text(value) and _CGROUP.fullmatch(value) is not None


_FILE: Shape = {
    "name": _path, "size": _size, "chunks": [_size], "mode": _mode, "uid": _id, "gid": _id,
    "mtime_ns": _whole(-(1 << 63), 63), "role": _text, "same_as?": _path,
}  # fmt: skip

_GPU: Shape = {
    "uuid": _text, "name": _text, "index": _number, "minor": _number, "memory_bytes": _size, "compute": _text,
    "persistence?": _flag, "mig?": _flag, "free_bytes?": _number,
}  # fmt: skip

_SETTINGS: Shape = {"cpus?": _cpus, "io_priority?": _id, "slack_ns?": _size}

_HEAD: Shape = {
    "name": _text,
    "id": _image_id,
    "skeleton": [_FILE],
    "files": [_FILE],
    "weights?": [{"path": _path, "size": _size, "mtime_ns": _whole(-(1 << 63), 63), "digest": _digest}],
    "crcli?": _text,
    "created?": _time,
    "host?": {
        "hostname?": _text, "kernel?": _text, "machine?": _text, "python?": _text, "page_size?": _size,
        "cpu_model?": _text, "cpu_flags?": [_text], "criu?": _text,
    },
    "tree?": [
        {
            "pid": _pid, "comm": _text, "argv": [_text], "exe?": _path, "cwd?": _path, "uid?": _id,
            "threads?": _size, "cpus?": _cpus, "core_filter?": _number, "settings?": {...: _SETTINGS},
        }
    ],
    "members?": [{"pid": _pid, "ppid": _pid, "comm": _text, "alive": _flag}],
    "plan?": {"shell_job": _flag, "manage_cgroups": _flag},
    "links?": [
        {
            "kind": _text, "key": _text, "external": _flag, "path": _path, "type": _text, "waits": _flag,
            "reads": _flag, "writes": _flag, "descriptors": [(_pid, _pid)], "terminal?": _whole(-1, 31),
        }
    ],
    "own_packs?": [_size],
    "run_id?": _text,
    "counts?": {...: _size},
    "indexes?": [_text],
    "merged?": [_text],
    "frozen_ms?": _time,
    "phases?": {...: _time},
    "opened?": [
        {
            "path": _path, "size": _size, "mode": _mode, "build_id": _text, "hash?": _text,
            "unhashed?": _text,
        }
    ],
    "databases?": [{"path": _path, "device": _whole(0, 64), "inode": _whole(0, 64)}],
    "folders?": [{"path": _path, "mode": _mode, "uid": _id, "gid": _id}],
    "mounts?": [{"point": _path, "fstype": _text, "source": _text}],
    "cgroups?": [_cgroup],
    "plugins?": [{"name": _text, "package": _text, "version": _text}],
    "job?": {
        "identity?": _text, "argv?": [_text], "cwd?": _path, "files?": {...: _text},
        "environment?": {...: _text}, "weights?": {...: _text}, "lease?": _size, "holder?": _text,
        "lease_file?": _text, "cpu_baseline?": [_text], "watched?": _text, "purpose?": _text,
        "failures?": _size, "ran_s?": _time,
    },
    "gpu?": {
        "host": {"driver": _text, "api": _size, "custom_storage?": _flag, "gpus": [_GPU]},
        "processes": [{"pid": _pid, "used": {...: _size}, "saved?": [(_size, _size)]}],
    },
}  # fmt: skip
"""What FORMAT.md says of the head. A field whose name ends with `?` may be missing, others are passed over;
`...` stands for every name, a list for any number of what it holds, a tuple for as many."""


def read_head(data: bytes, name: str) -> dict[str, Any]:
    """Decode and check the head of the manifest that messages call `name`. Raises ImageDamaged."""
    head = parse_head(data, name)
    check_head(head, name)
    return head


def parse_head(data: bytes, name: str) -> dict[str, Any]:
    """Decode the head of a manifest, whatever it says. Raises ImageDamaged where it is none."""
    try:
        head = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageDamaged(f"{name} has a head that is no JSON: {error}") from error
    if not isinstance(head, dict):
        raise ImageDamaged(f"{name} has a head that is no object")
    return head


def check_head(head: dict[str, Any], name: str) -> None:
    """Raise ImageDamaged where a field of a head is not what FORMAT.md says of it."""
    if (wrong := _misfit(head, _HEAD)) is not None:
        raise ImageDamaged(f"{name} has something else where its head should have {wrong.lstrip('.')}")


def _misfit(value: Any, shape: Shape) -> str | None:
    """Where a value is not of a shape: the first place of it that is not; None where it is."""
    if isinstance(shape, dict):
        return _misfit_of_record(value, shape)
    if isinstance(shape, list | tuple):
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            return ""
        for number, one in enumerate(value):
            if (wrong := _misfit(one, shape[number if isinstance(shape, tuple) else 0])) is not None:
                return f"[{number}]{wrong}"
        return None
    return None if shape(value) else ""


def _misfit_of_record(value: Any, shape: dict[str | EllipsisType, Shape]) -> str | None:
    if not isinstance(value, dict):
        return ""
    for field, of_field in shape.items():
        if field is ...:
            for name, one in value.items():
                if not _text(name) or _misfit(one, of_field) is not None:
                    return f".{name!r}"
            continue
        name = field.removesuffix("?")
        if name in value:
            if (wrong := _misfit(value[name], of_field)) is not None:
                return f".{name}{wrong}"
        elif name == field:
            return f".{name}"
    return None

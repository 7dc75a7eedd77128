"""CRIU's messages, as protoc made them and pycriu ships them: those that crcli needs, and no others.

`import pycriu` runs the modules of all messages that CRIU has, and costs every command 11 ms. So these few
are taken from its folder one by one, those of image files when they are first used: a dump reaches CRIU
without them. They are run with upb alone (`protoc`), which spares as much again. Where that does not work
they are imported: they import each other by bare names, for which pycriu extends sys.path just as it is done
here.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any

from crcli.criu.protoc import Modules
from crcli.errors import HostLacks


def _pycriu_folder() -> str:
    found = find_spec("pycriu")
    if found is None or not found.submodule_search_locations:
        raise HostLacks(
            "pycriu, CRIU's own Python package, cannot be imported",
            hint="run scripts/quickstart, which makes CRIU's pycriu reachable from this Python",
        )
    return found.submodule_search_locations[0]


def _module_at(path: str) -> Any:
    """Import a file that is not on sys.path."""
    spec = spec_from_file_location(f"{__name__}.{path.rpartition('/')[2].removesuffix('.py')}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_folder = _pycriu_folder()


@cache
def _modules(folder: str) -> Modules:
    """Those of a folder."""
    return Modules(folder)


def _rpc() -> Any:
    """The module of what is said to CRIU."""
    try:
        return _modules(_folder).module("rpc_pb2")
    except Exception:  # protobuf has no upb here, or one that we do not know: its own way works
        return _module_at(f"{_folder}/rpc_pb2.py")


def _of_images(name: str) -> Any:
    """One of the modules of image files."""
    folder = f"{_folder}/images"
    try:
        return _modules(folder).module(name)
    except Exception:  # see above
        if folder not in sys.path:
            sys.path.append(folder)
        return import_module(name)


rpc = _rpc()

_MODULES = {
    "core_entry": "core",
    "cpuinfo_entry": "cpuinfo",
    "fd_types": "fdinfo",
    "fdinfo_entry": "fdinfo",
    "file_entry": "fdinfo",
    "file_lock_entry": "file_lock",
    "inventory_entry": "inventory",
    "memfd_inode_entry": "memfd",
    "mm_entry": "mm",
    "pagemap_entry": "pagemap",
    "pagemap_head": "pagemap",
    "pstree_entry": "pstree",
    "reg_file_entry": "regfile",
    "remap_file_path_entry": "remap_file_path",
    "stats_entry": "stats",
    "task_kobj_ids_entry": "core",
    "tcp_stream_entry": "tcp_stream",
    "tty_data_entry": "tty",
    "tty_info_entry": "tty",
}
"""The messages of image files, and the protoc module that each is in: imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(_of_images(f"{_MODULES[name]}_pb2"), name)
    globals()[name] = found
    return found


def import_all() -> None:
    """Import all messages now, and not when a tree stands still."""
    for name in _MODULES:
        __getattr__(name)


@cache
def _magics() -> dict[str, int]:
    found: dict[str, int] = _module_at(f"{_folder}/images/magic.py").by_name
    return found


def magic(name: str) -> int:
    """The number that image files of this kind begin with."""
    return _magics()[name]

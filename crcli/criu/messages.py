"""CRIU's messages, as protoc made them and pycriu ships them: those that crcli needs, and no others.

`import pycriu` runs the modules of all messages that CRIU has, and costs every command 11 ms. So these few
are taken from its folder one by one. They import each other by bare names, for which pycriu extends sys.path
just as it is done here.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any

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
if f"{_folder}/images" not in sys.path:
    sys.path.append(f"{_folder}/images")


def _message(name: str, module: str) -> Any:
    return getattr(import_module(f"{module}_pb2"), name)


rpc = _module_at(f"{_folder}/rpc_pb2.py")
MAGICS: dict[str, int] = _module_at(f"{_folder}/images/magic.py").by_name

core_entry = _message("core_entry", "core")
cpuinfo_entry = _message("cpuinfo_entry", "cpuinfo")
fd_types = _message("fd_types", "fdinfo")
fdinfo_entry = _message("fdinfo_entry", "fdinfo")
file_entry = _message("file_entry", "fdinfo")
file_lock_entry = _message("file_lock_entry", "file_lock")
inventory_entry = _message("inventory_entry", "inventory")
memfd_inode_entry = _message("memfd_inode_entry", "memfd")
mm_entry = _message("mm_entry", "mm")
pagemap_entry = _message("pagemap_entry", "pagemap")
pagemap_head = _message("pagemap_head", "pagemap")
pstree_entry = _message("pstree_entry", "pstree")
remap_file_path_entry = _message("remap_file_path_entry", "remap_file_path")
stats_entry = _message("stats_entry", "stats")
tcp_stream_entry = _message("tcp_stream_entry", "tcp_stream")
tty_info_entry = _message("tty_info_entry", "tty")

"""CRIU's messages without what protobuf's Python side adds: the same classes, and a way without upb."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OURS = """
from crcli.criu import messages
messages.import_all()
"""

USUAL = """
from importlib import import_module
import pycriu.images
from pycriu import rpc_pb2
"""

COMPARE = """
for name, module in messages._MODULES.items():
    assert getattr(messages, name) is getattr(import_module(f"pycriu.images.{module}_pb2"), name) or (
        name == "fd_types"
    ), name
assert messages.rpc.criu_req is rpc_pb2.criu_req
assert messages.rpc.RESTORE == rpc_pb2.RESTORE
assert messages.fd_types.items() == import_module("pycriu.images.fdinfo_pb2").fd_types.items()
"""

TALK = """
rpc = messages.rpc
asked = rpc.criu_req(type=rpc.RESTORE)
asked.opts.images_dir_fd = 3
asked.opts.inherit_fd.add(key="pipe:[1]", fd=7)
heard = rpc.criu_req.FromString(asked.SerializeToString())
assert heard.type == rpc.RESTORE and heard.opts.inherit_fd[0].key == "pipe:[1]", heard
core = messages.core_entry(mtype=messages.core_entry.X86_64)
core.tc.comm = "a program"
assert "X86_64" in str(core) and "a program" in str(core)
assert messages.file_entry(id=1, type=messages.fd_types.Value("REG")).type == messages.fd_types.Value("REG")
try:
    messages.core_entry.FromString(b"\\xff")
except Exception as error:
    from google.protobuf.message import DecodeError
    assert isinstance(error, DecodeError), error
else:
    raise AssertionError("damaged bytes are a message")
"""

WITHOUT_UPB = """
import sys
sys.modules["google._upb"] = None
"""


def run(code: str) -> set[str]:
    """Run a program; return the modules that it has imported."""
    code += "\nimport sys\nprint(chr(10).join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_messages_need_no_more_of_protobuf_than_upb() -> None:
    """What protobuf has for text, for services and for those without upb is not imported."""
    loaded = run(OURS + TALK)
    assert "google._upb._message" in loaded
    assert not {name for name in loaded if name.startswith("google.protobuf.")} & {
        "google.protobuf.internal.python_message",
        "google.protobuf.internal.builder",
        "google.protobuf.descriptor_pool",
        "google.protobuf.text_format",
    }


@pytest.mark.parametrize("code", [OURS + USUAL, USUAL + OURS], ids=["ours-first", "usual-first"])
def test_whoever_imports_pycriu_gets_the_same_classes(code: str) -> None:
    """A plug-in may use pycriu, before us or after us: there is one class of each message."""
    run(code + COMPARE + TALK)


def test_messages_work_without_upb() -> None:
    """Where protobuf has no compiled part, its own way is taken."""
    loaded = run(WITHOUT_UPB + OURS + TALK)
    assert "google.protobuf.internal.python_message" in loaded


def test_messages_work_with_a_protobuf_of_other_ways() -> None:
    """A module that asks for something else of protobuf than we know is imported in the usual way."""
    run("from crcli.criu import protoc\nprotoc.Modules._build = None\n" + OURS + TALK)

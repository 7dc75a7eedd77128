"""`vagrant/demo-move` and what provisions its machines, on nodes of namespaces in the place of vagrant's."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes.base import ROOT
from tests.support.nodes.namespaces import OUTSIDE, NamespaceNode, lan, why_not
from tests.support.s3servers import start_moto

VAGRANT = ROOT / "vagrant"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_demo_moves_an_agent(tmp_path: Path) -> None:
    """Two machines that were told of a store: the agent of one goes on, on the other."""
    with lan() as network, start_moto(address=OUTSIDE) as server:
        make_bucket = [sys.executable, str(VAGRANT / "provision" / "make_bucket.py"), server.endpoint_url]
        subprocess.run(make_bucket, check=True, timeout=60)
        nodes = {name: network.node(name) for name in ("one", "two")}
        for node in nodes.values():
            node.environment["CRCLI_PYTHON"] = sys.executable
            script = shlex.quote(str(VAGRANT / "provision" / "use-store"))
            assert "takes objects" in node.run(f"{script} {server.endpoint_url}", code=0).out
        variables = {
            "CRCLI_DEMO_ON": str(executable(tmp_path / "on", on(nodes))),
            "CRCLI_DEMO_OFF": str(executable(tmp_path / "off", off(nodes))),
            "CRCLI_CHECKOUT": str(ROOT),
            "CRCLI_PYTHON": sys.executable,
        }
        demo = [str(VAGRANT / "demo-move")]
        done = subprocess.run(demo, env=os.environ | variables, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        assert "it went on, with the same memory" in done.stderr
        assert not nodes["one"].is_alive()
        assert any("crcli/demo/agent.py" in command for command in nodes["two"].processes().values())


def executable(path: Path, text: str) -> Path:
    """A script for the shell."""
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def on(nodes: dict[str, NamespaceNode]) -> str:
    """What runs a command on a node, as `vagrant ssh` does."""
    lines = [f'{name}) exec {shlex.join(node.command_there())} "$2" ;;' for name, node in nodes.items()]
    return "case $1 in\n" + "\n".join(lines) + "\nesac\n"


def off(nodes: dict[str, NamespaceNode]) -> str:
    """What switches a node off, as `vagrant halt --force` does."""
    return (
        "case $1 in\n"
        + "\n".join(f"{name}) kill -KILL {node.init_pid} ;;" for name, node in nodes.items())
        + "\nesac\n"
    )


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="no vagrant here")
def test_the_vagrantfile_is_valid() -> None:
    """Vagrant accepts it, providers aside: those are not asked, as they need not be here."""
    command = ["vagrant", "validate", "--ignore-provider"]
    done = subprocess.run(command, cwd=VAGRANT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

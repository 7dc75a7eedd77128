"""Tests of tests/real that need a kernel which this host may not have, in virtual machines with theirs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator

import pytest

from tests.support.nodes.kernels import Kernel, kernels
from tests.support.nodes.vm import ROOT, Machine, booted, why_not

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=f"{why_not()}: ./scripts/test nodes installs what it takes"),
    pytest.mark.timeout(1200),
]

PRE_COPY = "tests/real/test_pre_copy.py"
TRACKED = re.findall(r"^@tracking\n(?:@.*\n)*def (test_\w+)", (ROOT / PRE_COPY).read_text(), re.MULTILINE)


@pytest.fixture(scope="module", params=kernels(), ids=lambda kernel: kernel.release)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine with each kernel that is here, one after the other."""
    kernel: Kernel = request.param
    with booted(kernel) as found:
        yield found


def test_a_machine_has_its_own_kernel(machine: Machine) -> None:
    """What runs inside runs on that kernel, on this host's files, which it cannot change."""
    assert machine.run("uname -r").out.strip() in {kernel.release for kernel in kernels()}
    assert machine.run(f"test -e {shlex.quote(str(ROOT / PRE_COPY))}").code == 0
    assert machine.run(f"touch {shlex.quote(str(ROOT / 'x'))}").code != 0
    assert machine.run("exit 7").code == 7


@pytest.mark.parametrize("name", TRACKED)
def test_pre_copy(name: str, machine: Machine) -> None:
    """Each test of rounds passes on a kernel that tracks writes, and none is skipped."""
    python = shlex.quote(sys.executable)
    command = f"{python} -m pytest -p no:cacheprovider -rs {PRE_COPY}::{name}"
    done = machine.run(
        f"cd {shlex.quote(str(ROOT))} && PYTHONDONTWRITEBYTECODE=1 CRCLI_TEST_SLOWNESS=5 {command}",
        limit_s=600,
    )
    assert done.code == 0, done.out
    assert "passed" in done.out and "skipped" not in done.out, done.out

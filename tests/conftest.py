"""What all lanes share: limits that suit the machine, and how tests run beside each other.

`scripts/test` runs twice as many tests at once as there are processors: a test waits half of its time.
One with `@pytest.mark.alone` judges the whole machine, or needs all of it: it runs afterwards, by itself.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from crcli.pipeline import interrupts
from tests.support.programs import FORMER_FOLDERS, SLOWNESS

# No test asserts on time: on a busy machine an example takes as long as it takes.
settings.register_profile("crcli", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crcli")


def pytest_configure() -> None:
    """Have SIGINT and SIGQUIT do what they do by default, here and in all that we start: a shell without job
    control has those that it starts in the background ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture
def hang_ups_end_us() -> Iterator[None]:
    """SIGHUP does what it does by default: under nohup it is ignored, in all that we start as well."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def signals_are_heard_again() -> Iterator[None]:
    """A command that a test has run in this process ends it in earnest, and hears no signals any more."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    interrupts._answers_first = False
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_stays_in_tmp() -> Iterator[None]:
    """A test that restores a program of its own does so while the program's folder is there."""
    yield
    left = [folder for folder in FORMER_FOLDERS if folder.exists()]
    FORMER_FOLDERS.clear()
    for folder in left:
        shutil.rmtree(folder)
    assert not left, f"restored after the block that had the program's folder: {left}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many workers `-n auto` means."""
    return 2 * (os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test longer where everything takes longer."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0] if marker else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(seconds * SLOWNESS), append=False)

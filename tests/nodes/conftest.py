"""The order of tests in virtual machines: all of one machine, then all of the next."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests that visit a machine by their visits; pytest would boot a machine anew for some."""
    from tests.nodes.test_kernels import VISITS

    order = list(VISITS)
    places = [number for number, item in enumerate(items) if visit_of(item)]
    visitors = sorted((items[number] for number in places), key=lambda item: order.index(visit_of(item)))
    for number, item in zip(places, visitors, strict=True):
        items[number] = item


def visit_of(item: pytest.Item) -> str:
    """The machine that a test visits; empty when it visits none."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("visit", "")) if callspec else ""

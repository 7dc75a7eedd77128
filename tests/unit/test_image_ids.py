"""The ids of images: what is newer is decided by them."""

from __future__ import annotations

import pytest

from crcli.image import names
from crcli.image.names import is_id, new_image_id


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later id is a greater text, to the millisecond."""
    monkeypatch.setattr(names.time, "time", lambda: 1769903999.123)
    first = new_image_id()
    assert first.startswith("20260131T235959123-") and is_id(first)
    monkeypatch.setattr(names.time, "time", lambda: 1769903999.124)
    assert new_image_id() > first


def test_an_id_is_later_than_the_one_before_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour behind, and over the end of a day; where the clock is ahead it is believed."""
    monkeypatch.setattr(names.time, "time", lambda: 1769903999.123)
    for before in ("20260131T235959123-ffffff", "20260131T235959999-0a1b2c", "20260201T010000000-0a1b2c"):
        later = new_image_id(before)
        assert later > before and is_id(later)
    assert new_image_id("20260131T235959999-0a1b2c").startswith("20260201T000000000-")
    assert new_image_id("20260101T000000000-0a1b2c").startswith("20260131T235959123-")

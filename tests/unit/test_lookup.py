"""Digests are found where they stand, and no others, whichever way they are looked up."""

from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import assume, given
from hypothesis import strategies as st

from crcli.errors import ImageDamaged
from crcli.image import lookup
from crcli.image.lookup import SeveralDigests, TabledDigests, TableMaker, keys_of, read_table, sort_digests

DIGESTS = st.builds(
    lambda head, tail: head.to_bytes(8, "little") + tail.to_bytes(24, "big"),
    st.sampled_from([0, 1, 2, 3, 1 << 32, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 2),
)
"""Many begin alike: then the rest must tell them apart."""


def first_rows(digests: list[bytes]) -> dict[bytes, int]:
    """The first row in which each digest stands."""
    return {digest: row for row, digest in reversed(list(enumerate(digests)))}


@pytest.mark.parametrize("few", [0, lookup.FEW_DIGESTS], ids=["many digests", "few"])
@given(there=st.lists(DIGESTS, max_size=60), asked=st.lists(DIGESTS, max_size=60))
def test_what_is_there_is_found_and_nothing_else(few: int, there: list[bytes], asked: list[bytes]) -> None:
    """As a plain dictionary would answer, but that of digests which begin alike one may be missed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "FEW_DIGESTS", few)
        table = sort_digests(b"".join(there))
    rows, keys = first_rows(there), [digest[:8] for digest in there]
    asked += there
    for digest, row in zip(asked, table.find(asked), strict=True):
        if row is None:
            assert digest not in rows or keys.count(digest[:8]) > 1
        else:
            assert there[row] == digest


@given(
    there=st.lists(st.lists(DIGESTS, max_size=20), max_size=5),
    asked=st.lists(DIGESTS, max_size=60),
    expected=st.integers(0, 200),
    tail=st.lists(DIGESTS, max_size=20),
)
def test_tables_find_what_is_there_and_nothing_else(
    there: list[list[bytes]], asked: list[bytes], expected: int, tail: list[bytes]
) -> None:
    """As a plain dictionary would answer, whether or not it was known how many would come; behind them stand
    others that have no table."""
    joined = [digest for part in there for digest in part]
    assume(joined)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "WORTH_A_TABLE", 1)
        maker = TableMaker()
        maker.expect(expected)
        for part in there:
            maker.add(b"".join(part))
        table = read_table(bytes(maker.table()), "a table")
    tabled = TabledDigests(b"".join(joined), table)
    rows, asked = first_rows(joined), [*asked, *joined]
    found = tabled.find(asked)
    assert [row is not None for row in found] == [digest in rows for digest in asked]
    assert all(row is None or joined[row] == digest for digest, row in zip(asked, found, strict=True))
    both = SeveralDigests([tabled, sort_digests(b"".join(tail))], [len(joined)])
    for digest, row in zip(asked, both.find(asked), strict=True):
        assert (digest in rows) <= (row is not None)
        assert row is None or [*joined, *tail][row] == digest


def test_a_table_of_too_many_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of too few."""
    monkeypatch.setattr(lookup, "WORTH_A_TABLE", 2)
    monkeypatch.setattr(lookup, "TABLE_LIMIT", 3)
    maker, sizes = TableMaker(), []
    maker.expect(10)
    for number in range(6):
        maker.add(bytes([number]) * 32)
        sizes.append(len(maker.table()))
    assert [size > 0 for size in sizes] == [False, True, True, False, False, False]


def test_a_page_that_was_stored_again_and_again_takes_few_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each search for a place for it, and many for others, would pass all of its entries."""
    monkeypatch.setattr(lookup, "WORTH_A_TABLE", 1)
    maker, same = TableMaker(), b"x" * 32
    others = [blake3(bytes([number >> 8, number & 255])).digest() for number in range(3000)]
    maker.expect(6000)
    for one in others:
        maker.add(same + one)
    table = read_table(bytes(maker.table()), "a table")
    assert sum(map(bool, table)) <= len(others) + lookup._FARTHEST
    joined = b"".join(same + one for one in others)
    found = TabledDigests(joined, table).find([same, *others[::-1]])
    expected = [0, *range(2 * len(others) - 1, 0, -2)]
    assert all(row in (None, there) for row, there in zip(found, expected, strict=True))
    assert found[0] == 0 and found.count(None) < len(others) / 20


@pytest.mark.parametrize("entries", [1 << 10, 1 << 14])
def test_a_table_in_which_searches_would_take_long_is_none(entries: int) -> None:
    """One free entry ends each of them, but thousands of steps for each page would hold up a dump."""
    with pytest.raises(ImageDamaged):
        read_table(b"\1\0\0\0" * (2 * entries - 1) + bytes(4), "a table")


@given(st.lists(DIGESTS, max_size=60))
def test_keys_are_the_first_bytes(digests: list[bytes]) -> None:
    """Of each digest, in their order."""
    assert keys_of(b"".join(digests)) == b"".join(digest[:8] for digest in digests)

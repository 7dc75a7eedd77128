"""Digests are found where they stand, and no others, whichever way they are looked up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcli.image import lookup
from crcli.image.lookup import keys_of, sort_digests

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


@given(st.lists(DIGESTS, max_size=60))
def test_keys_are_the_first_bytes(digests: list[bytes]) -> None:
    """Of each digest, in their order."""
    assert keys_of(b"".join(digests)) == b"".join(digest[:8] for digest in digests)

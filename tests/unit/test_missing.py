"""Which pages are missing, and where they belong: held against a plain dictionary."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from crcli.memory.extents import Extent, Origin, Source, SpaceKey, SpaceKind
from crcli.memory.lazy import SMALL_LIMIT, SMALL_PAGES, first_wanted
from crcli.memory.missing import Missing

SPAN = 40

steps = st.lists(
    st.tuples(
        st.sampled_from(("drop", "remove", "move")),
        st.integers(0, SPAN - 1),
        st.integers(1, 8),
        st.integers(0, SPAN - 1),
    ),
    max_size=12,
)


def _apply(missing: Missing, model: dict[int, int], step: tuple[str, int, int, int]) -> None:
    """One thing that happens to memory; `model` says for each missing page where it belongs."""
    what, start, pages, to = step
    if what == "drop":
        missing.drop(start, pages)
        for page in range(start, start + pages):
            model.pop(page, None)
    elif what == "remove":
        missing.remove(start, pages)
        for origin in [one for one, place in model.items() if start <= place < start + pages]:
            del model[origin]
    elif abs(to - start) >= pages:  # mremap(2) refuses to move memory onto itself
        missing.move(start, pages, to)
        moved = [one for one, place in model.items() if start <= place < start + pages]
        for origin in [one for one, place in model.items() if to <= place < to + pages]:
            del model[origin]
        for origin in moved:
            model[origin] += to - start


@given(pages=st.sets(st.integers(0, SPAN - 1)), done=steps)
@settings(max_examples=300)
def test_it_knows_of_every_page_whether_and_where_it_is_missing(
    pages: set[int], done: list[tuple[str, int, int, int]]
) -> None:
    """After any sequence of arrivals, removals and moves it says what a dictionary of all pages says."""
    missing, model = Missing((page, 1) for page in pages), {page: page for page in pages}
    for step in done:
        before, kept = missing.copy(), dict(model)
        _apply(missing, model, step)
        assert _pages(missing) == model
        assert _pages(before) == kept, "a copy changes with the original"
        assert missing.pages == len(model) and bool(missing) == bool(model)
        for page in range(-SPAN, 2 * SPAN):
            origin = missing.origin_of(page)
            assert (model[origin] == page) if origin is not None else page not in model.values()


def _pages(missing: Missing) -> dict[int, int]:
    return {
        origin: origin + stretch.shift
        for stretch in missing.within(-SPAN, 3 * SPAN)
        for origin in range(stretch.origin, stretch.end)
    }


def test_neighbours_are_one_stretch() -> None:
    """Runs that follow one another are filled in together."""
    found = Missing([(8, 4), (4, 4), (20, 1)]).within(0, 100)
    assert [(one.origin, one.pages) for one in found] == [(4, 8), (20, 1)]


def test_small_pieces_of_memory_come_first() -> None:
    """What a program is likely to touch at once: the smallest pieces, zeros left out, and no large one."""

    def chunk(start: int, pages: int, number: int) -> Extent:
        return Extent(start, pages, Source.CHUNK, number)

    large = [chunk(10_000, SMALL_PAGES // 2, 1), chunk(10_000 + SMALL_PAGES // 2, SMALL_PAGES, 2)]
    stack = [chunk(50_000, 30, 3), Extent(50_030, 4, Source.ZERO), chunk(50_034, 2, 4)]
    one, other = SpaceKey(SpaceKind.PROCESS, 1), SpaceKey(SpaceKind.PROCESS, 2)
    found = first_wanted({one: [*large, *stack], other: [chunk(7, 1, 5)]})
    assert found == {Origin(Source.CHUNK, number) for number in (3, 4, 5)}
    many = {
        one: [chunk(2 * SMALL_PAGES * at, SMALL_PAGES, at) for at in range(2 * SMALL_LIMIT // SMALL_PAGES)]
    }
    assert len(first_wanted(many)) == SMALL_LIMIT // SMALL_PAGES

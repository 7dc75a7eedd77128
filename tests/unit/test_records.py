"""Records hold what they are given, and compare by it."""

from __future__ import annotations

import copy
import pickle
from functools import cached_property
from typing import ClassVar

import pytest

from crcli.records import Struct, asdict, astuple, field, fields_of, replace


class Place(Struct, frozen=True):
    """A frozen one."""

    KINDS: ClassVar[int] = 2

    name: str
    size: int = 3

    @cached_property
    def shout(self) -> str:
        """Something worked out, and kept."""
        return self.name.upper()


class Basket(Struct):
    """One that can be changed."""

    things: list[int] = field(default_factory=list)
    owner: str = ""


class Named(Basket):
    """One more field."""

    label: str = "x"


class Corner(Place):
    """Frozen as what it is derived from."""

    floor: int = 0


class Alone(Struct, eq=False):
    """Equal only to itself."""

    name: str


def test_values_by_place_and_by_name() -> None:
    """A record takes its values in order, by name, and from its defaults."""
    assert Place("a") == Place(name="a", size=3) == Place("a", size=3) == Place("a", 3)
    assert fields_of(Place) == ("name", "size")
    assert asdict(Place("a", 4)) == {"name": "a", "size": 4}
    assert astuple(Place("a", 4)) == ("a", 4)
    assert repr(Place("a")) == "Place(name='a', size=3)"


def test_each_has_its_own_list() -> None:
    """What a factory makes is made for each."""
    first, second = Basket(), Basket()
    first.things.append(1)
    assert second.things == []
    assert first != second


def test_derived_ones_have_all_fields() -> None:
    """Fields of the class that one is derived from come first."""
    assert astuple(Named([1], "me")) == ([1], "me", "x")
    assert Named([1]) != Basket([1])


def test_frozen_ones_stay_as_they_are() -> None:
    """They cannot be changed, are keys, and may keep what was worked out from them."""
    place = Place("a")
    with pytest.raises(AttributeError, match="size"):
        place.size = 4  # type: ignore[misc]
    with pytest.raises(AttributeError, match="size"):
        del place.size
    assert {place: 1}[Place("a")] == 1
    assert place.shout == "A"
    assert place == Place("a")
    assert asdict(place) == {"name": "a", "size": 3}
    with pytest.raises(TypeError):
        hash(Basket())


def test_what_is_derived_from_a_frozen_one_is_frozen() -> None:
    """Also where it does not say so itself: it stays as it is, and is a key."""
    corner = Corner("a", floor=2)
    with pytest.raises(AttributeError, match="floor"):
        corner.floor = 3
    assert {corner: 1}[Corner("a", 3, 2)] == 1


def test_some_are_equal_only_to_themselves() -> None:
    """With eq=False, as of any other object."""
    one = Alone("a")
    assert one != Alone("a")
    assert {one: 1}[one] == 1


def test_replaced_copied_and_sent() -> None:
    """A changed copy is checked as a new one is; copies and pickles are the same record."""
    assert replace(Place("a"), size=9) == Place("a", 9)
    with pytest.raises(TypeError, match="no colour"):
        replace(Place("a"), colour="red")
    assert copy.copy(Place("a")) == pickle.loads(pickle.dumps(Place("a"))) == Place("a")


@pytest.mark.parametrize(
    ("values", "named", "said"),
    [
        ((), {}, "needs name"),
        (("a", 1, 2), {}, "takes 2 values, not 3"),
        (("a",), {"name": "b"}, "name twice"),
        (("a",), {"colour": "red"}, "no colour"),
    ],
    ids=["missing", "too-many", "twice", "unknown"],
)
def test_wrong_values_are_told(values: tuple[object, ...], named: dict[str, object], said: str) -> None:
    """A call that would leave a record without a field, or with one too many, raises TypeError."""
    with pytest.raises(TypeError, match=said):
        Place(*values, **named)  # type: ignore[arg-type]

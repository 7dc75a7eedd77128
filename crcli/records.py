"""Records: classes whose instances are made of named values, written down as those of dataclasses are.

A dataclass takes Python 0.55 ms to make, because it writes and compiles the methods of each, and to import a
library that is quicker at it takes 17 ms: more than a restore's whole guard. These share their methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Callable


class _Made:
    """A default that is made for each instance by itself."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], Any]) -> Any:
    """The default of a field that is to be made for each instance by itself, a list say."""
    return _Made(default_factory)


@dataclass_transform(field_specifiers=(field,))
class Struct:
    """A record: `class Point(Struct, frozen=True)`, with its fields as annotations, and their defaults.

    A class of records that is derived from another has its fields too, before its own.
    Two are equal when they are of one class and all of their fields are equal; with `eq=False` each is equal
    only to itself. Those of a `frozen` class, and of classes that are
    derived from one, cannot be changed, and have a hash if their fields have.
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    _names: ClassVar[frozenset[str]] = frozenset()
    _defaults: ClassVar[dict[str, Any]] = {}
    _made: ClassVar[dict[str, Callable[[], Any]]] = {}

    def __init_subclass__(cls, *, frozen: bool = False, eq: bool = True) -> None:
        """Learn the fields from the annotations, and take the defaults from where these put them."""
        own = [name for name, kind in cls.__annotations__.items() if "ClassVar" not in str(kind)]
        given = {name: cls.__dict__[name] for name in own if name in cls.__dict__}
        made = {name: value.make for name, value in given.items() if isinstance(value, _Made)}
        plain = {name: value for name, value in given.items() if name not in made}
        cls._fields = (*cls._fields, *own)
        cls._names = frozenset(cls._fields)
        cls._made, cls._defaults = {**cls._made, **made}, {**cls._defaults, **plain}
        for name in given:
            delattr(cls, name)
        frozen = frozen or cls.__setattr__ is _refuse
        if eq:
            cls.__eq__ = _are_equal  # type: ignore[method-assign,assignment]
            cls.__hash__ = _hash_of_fields if frozen else None  # type: ignore[method-assign,assignment]
        if frozen:
            cls.__setattr__ = cls.__delattr__ = _refuse  # type: ignore[method-assign,assignment]

    def __init__(self, *values: Any, **named: Any) -> None:
        state = self.__dict__  # filled all at once: that is quick, and possible for a frozen one
        if not named and len(values) == len(self._fields):
            state.update(zip(self._fields, values, strict=True))
            return
        state.update(self._defaults)
        state.update(zip(self._fields, values, strict=False))
        state.update(named)
        for name, make in self._made.items():
            if name not in state:
                state[name] = make()
        if (
            len(values) > len(self._fields)
            or state.keys() != self._names
            or not named.keys().isdisjoint(self._fields[: len(values)])
        ):
            raise TypeError(_what_is_wrong(self, values, named))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({shown})"


T = TypeVar("T", bound=Struct)


def fields_of(kind: type[Struct]) -> tuple[str, ...]:
    """The names of the fields of a class of records, in order."""
    return kind._fields


def astuple(record: Struct) -> tuple[Any, ...]:
    """The values of its fields, in order."""
    return tuple(getattr(record, name) for name in record._fields)


def asdict(record: Struct) -> dict[str, Any]:
    """Its fields by name. Records in these stay records."""
    return {name: getattr(record, name) for name in record._fields}


def replace(record: T, **changes: Any) -> T:
    """The same record, but for these fields."""
    return type(record)(**{**asdict(record), **changes})


def _are_equal(ours: Struct, theirs: Any) -> Any:
    return astuple(ours) == astuple(theirs) if type(ours) is type(theirs) else NotImplemented


def _hash_of_fields(record: Struct) -> int:
    return hash(astuple(record))


def _refuse(record: Struct, name: str, value: object = None) -> None:
    raise AttributeError(f"{type(record).__name__} is frozen: {name} stays as it is")


def _what_is_wrong(record: Struct, values: tuple[Any, ...], named: dict[str, Any]) -> str:
    kind, fields, state = type(record).__name__, record._fields, record.__dict__
    if len(values) > len(fields):
        return f"{kind} takes {len(fields)} values, not {len(values)}"
    if again := named.keys() & set(fields[: len(values)]):
        return f"{kind} was given {', '.join(sorted(again))} twice"
    if unknown := sorted(state.keys() - record._names):
        return f"{kind} has no {', '.join(unknown)}"
    return f"{kind} needs {', '.join(name for name in fields if name not in state)}"

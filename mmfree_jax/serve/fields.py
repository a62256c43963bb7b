"""Fields of a JSON request: a reader for each kind, and from an object to a dataclass.

A dataclass names a reader at each field, `Annotated[float, number(Range(0, 2))]`. `null` is the
same as nothing, as OpenAI's clients send it. Nothing here imports JAX.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mmfree_jax.ranges import SMALLEST, Range
from mmfree_jax.serve.request_errors import RequestError, bad_field

Reader = Callable[[Any, str], Any]
"""Takes a JSON value and the field's name, and gives what the dataclass holds.

Raises RequestError."""

_T = TypeVar("_T")


def number(allowed: Range) -> Reader:
    """A number within a range; true and false are none."""

    def read(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad_field(name, value, f"give a number, {allowed}")
        if 0 < abs(value) < SMALLEST:
            raise bad_field(name, value, f"it is 0 in float32: set {allowed}, 1e-37 or 0 say")
        if not allowed.holds(value):
            raise bad_field(name, value, f"set {allowed}")
        return float(value)

    return read


def whole(low: int, high: int) -> Reader:
    """A whole number from `low` to `high`."""

    def read(value: Any, name: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise bad_field(name, value, f"give a whole number from {low} to {high}")
        return value

    return read


def flag(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise bad_field(name, value, "give true or false")
    return value


def text(value: Any, name: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise bad_field(name, value, "give a string")
    return value


def one_of(*choices: str) -> Reader:
    """One of some strings."""

    def read(value: Any, name: str) -> str:
        if value not in choices:
            raise bad_field(name, value, f"choose one of {', '.join(choices)}")
        return value

    return read


def list_of(reader: Reader, *, most: int, what: str) -> Reader:
    """A list of at most `most` elements, each read by `reader`, as a tuple."""

    def read(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise bad_field(name, value, f"give a list of at most {most} {what}")
        return tuple(reader(element, f"{name}[{i}]") for i, element in enumerate(value))

    return read


def object_of(target: type[Any]) -> Reader:
    """An object with the fields of a dataclass."""

    def read(value: Any, name: str) -> Any:
        return read_object(target, value, name=name)

    return read


def _shown(key: str) -> str:
    """The name of an unknown field, in one short line."""
    if len(key) > 80:
        return f"{key[:60]!r}... ({len(key)} characters)"
    return key if key.isprintable() and key else repr(key)


def read_object(
    target: type[_T],
    value: Any,
    *,
    name: str = "",
    ignored: frozenset[str] = frozenset(),
    refused: Mapping[str, str] | None = None,
    idle: Mapping[str, Sequence[Any]] | None = None,
) -> _T:
    """A dataclass from a JSON object.

    Args:
      target: the dataclass; each field is `Annotated` with its reader.
      value: as `json.loads` gives it.
      name: of the object in messages; "": it is the whole body.
      ignored: fields that change nothing here and are passed over.
      refused: fields that others know and this server does not, and what to say of each.
      idle: values of refused fields that ask for nothing beyond what is done anyway.

    Raises:
      RequestError: it is no object; a field is missing, unknown, refused or wrong.
    """
    if not isinstance(value, dict):
        raise bad_field(name, value, "give a JSON object")
    prefix = f"{name}." if name else ""
    hints = typing.get_type_hints(target, include_extras=True)
    for key, given in value.items():
        if key in hints or key in ignored or given is None:
            continue
        if any(type(given) is type(v) and given == v for v in (idle or {}).get(key, ())):
            continue
        way_out = (refused or {}).get(key)
        if way_out is None:
            raise RequestError(
                f"{prefix}{_shown(key)} is not a field that this server knows: leave it out",
                param=f"{prefix}{key}"[:200],
                code="unknown_parameter",
            )
        raise RequestError(
            f"{prefix}{key} is not supported: {way_out}",
            param=f"{prefix}{key}",
            code="unsupported_parameter",
        )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(target):  # type: ignore[arg-type]
        given = value.get(field.name)
        if given is not None:
            reader: Reader = hints[field.name].__metadata__[0]
            values[field.name] = reader(given, f"{prefix}{field.name}")
        elif field.default is dataclasses.MISSING:
            raise RequestError(
                f"{prefix}{field.name} is missing: give it",
                param=f"{prefix}{field.name}",
                code="missing_required_parameter",
            )
    return target(**values)

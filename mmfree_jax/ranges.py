"""Which numbers a setting may be: declared at its annotation, checked in one place.

`Annotated[float, Range(0)]`, or one of the names below, on a field of a config dataclass or on
a parameter of a command. A number without a range must be finite all the same. Files and folders
are looked at here too (`places.py`), and texts: they must be what UTF-8 and a path can hold.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import PurePath
from typing import Annotated, Any, Literal

from mmfree_jax.errors import ConfigError
from mmfree_jax.places import check_local, check_place, is_place, places, takes_url

LARGEST = 3.4028234663852886e38
"""Of float32, in which settings are computed with: a larger number is inf there."""
SMALLEST = 1.1754943508222875e-38
"""Likewise: what is nearer to 0 is 0 there, on devices that know no subnormal numbers."""
MOST = 2**31 - 1
"""Of what is counted: counters on devices have 32 bits."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`; without an end where it is marked as open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is finite and no other in float32, and within; False for NaN."""
        if not abs(value) <= LARGEST or 0 < abs(value) < SMALLEST:
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """In words, behind "set"."""
        if self.high not in (MOST, math.inf):
            return f"a value in {'(['[not self.open_low]}{_short(self.low)}, " + (
                f"{_short(self.high)}{')]'[not self.open_high]}"
            )
        if self.low == -math.inf:
            return "a finite number"
        return f"a value above {self.low:g}" if self.open_low else f"{self.low:g} or more"


AboveZero = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
ShareBelowOne = Annotated[float, Range(0, 1, open_high=True)]
InnerShare = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Count = Annotated[int, Range(0, MOST, open_low=True)]
CountOrZero = Annotated[int, Range(0, MOST)]
Step = CountOrZero | Literal["best"]
"""A checkpoint of a run: the step that it was made after, or the best by the run's metric."""
Layers = Annotated[int, Range(1, 10_000)]
"""Each has names, shapes and programs of its own, which are made before the first array is."""
TwoOrMore = Annotated[int, Range(2, MOST)]
Port = Annotated[int, Range(1, 65535)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""What every generator in use takes: 32 bits without a sign."""


def check_numbers(config: Any, section: str = "") -> None:
    """Refuses what `check_values` refuses among a dataclass's fields.

    Nested dataclasses are left to themselves.

    Args:
      config: an instance; call this in `__post_init__`.
      section: what stands before the field's name in the message, "optimizer." for example.

    Raises:
      ConfigError: names the field, its value and the way out.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    check_values(values, hints, lambda name: f"{section}{name}")


def check_values(
    values: dict[str, Any], hints: dict[str, Any], title: Callable[[str], str]
) -> None:
    """Refuses a number that is not finite or not in its annotation's range, a URL, a broken text.

    Args:
      values: by name; anything but places, texts and numbers, and tuples, lists and dicts of them,
        is passed over.
      hints: annotations by name, `Annotated` kept.
      title: what a message calls a name.

    Raises:
      ConfigError: names the setting, its value and the way out.
    """
    for name, value in values.items():
        if is_place(hint := hints.get(name)):
            for place in places(value):
                (check_place if takes_url(hint) else check_local)(place, title(name))
        for text in _texts(value):
            if wrong := _wrong_text(text):
                raise ConfigError(f"{title(name)} is {text!r}: {wrong}")
        allowed = next(ranges(hints.get(name)), Range())
        for number in _numbers(value):
            if not allowed.holds(number):
                way_out = _way_out(number, allowed)
                raise ConfigError(f"{title(name)} is {value!r}: set {way_out}")
            if number % 1 and {*_kinds(hints.get(name))} == {int}:
                raise ConfigError(f"{title(name)} is {value!r}: set a whole number")


def _kinds(hint: Any) -> Iterator[type]:
    """int and float, as an annotation names them."""
    if hint in (int, float):
        yield hint
    elif typing.get_origin(hint) is not Literal:
        for part in typing.get_args(hint):
            yield from _kinds(part)


def _way_out(number: float, allowed: Range) -> str:
    """What to set in place of a number that is not allowed."""
    if not abs(number) < math.inf:
        return "a finite number" if allowed == Range() else f"a finite number, {allowed}"
    if number < allowed.low:
        return str(allowed)
    if allowed.high == MOST < number:
        return f"at most {MOST}"
    if abs(number) > LARGEST:
        return "a number that float32 holds, at most 3.4e38"
    if 0 < abs(number) < SMALLEST:
        return "a number that float32 holds: 0 is the nearest, 1.2e-38 the next"
    return str(allowed)


def _wrong_text(text: str) -> str | None:
    """What is wrong with a text that no file and no path can hold."""
    if "\0" in text:
        return "leave out the character NUL"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it is not Unicode (half of a surrogate pair): write it in UTF-8"
    return None


def ranges(hint: Any) -> Iterator[Range]:
    """The ranges in an annotation, also within a union, a tuple, a list or a dict."""
    if typing.get_origin(hint) is Annotated:
        yield from (m for m in hint.__metadata__ if isinstance(m, Range))
        hint = hint.__origin__
    if isinstance(hint, types.GenericAlias | types.UnionType) or typing.get_args(hint):
        for part in typing.get_args(hint):
            yield from ranges(part)


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's too
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (str, PurePath)):
        yield str(value)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for part in (*value, *value.values()):
            yield from _texts(part)


def _short(number: float) -> str:
    return "2^32 - 1" if number == 2**32 - 1 else f"{number:g}"


def require(condition: bool, name: str, value: object, way_out: str) -> None:
    """Raises a ConfigError that names the field, its value and the way out."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}: {way_out}")


def require_distinct(name: str, values: Sequence[Any]) -> None:
    """Raises a ConfigError that names the field where a value occurs twice."""
    require(len(set(values)) == len(values), name, list(values), "give each value once")

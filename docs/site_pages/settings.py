"""The reference of a run's settings, from the dataclasses that define them."""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from mmfree_jax.config import TrainConfig
from mmfree_jax.places import takes_url
from mmfree_jax.ranges import MOST, Range, ranges

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def explanations(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, by the field's name."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def default(field: dataclasses.Field[Any]) -> Any:
    """The field's default."""
    made = field.default_factory
    return field.default if isinstance(made, dataclasses._MISSING_TYPE) else made()


def allowed(hint: Any) -> str:
    """What a setting may be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("`null`" if part is type(None) else allowed(part) for part in arguments)
    if origin is tuple:
        several = arguments[-1] is Ellipsis
        return f"a list of {allowed(arguments[0])}" if several else f"{len(arguments)} of them"
    if origin is Annotated:
        limits = next(ranges(hint), None)
        if limits is None:
            return "a file or folder, or its URL" if takes_url(hint) else "a file or folder"
        return f"{KINDS[hint.__origin__]}, {_limits(limits)}"
    return KINDS[hint]


def _limits(limits: Range) -> str:
    """The ends of a range, in words."""
    if limits.high == MOST and limits.low == 0:
        return "above 0" if limits.open_low else "0 or more"
    return str(limits).removeprefix("a value ")


def rows(kind: type, prefix: str) -> Iterator[str]:
    """A table of the fields of a dataclass, then one for each dataclass in it."""
    told, hints = explanations(kind), typing.get_type_hints(kind, include_extras=True)
    inner = []
    yield f"## {prefix.rstrip('.') or 'The run'}"
    yield f"\n{inspect.getdoc(kind)}\n"
    yield "| setting | may be | default | |\n|---|---|---|---|"
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner.append((hint, f"{prefix}{field.name}."))
            continue
        value = default(field)
        shown = "`null`" if value is None else f"`{_text(value)}`"
        cells = (f"`{prefix}{field.name}`", allowed(hint), shown, told[field.name])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for other, path in inner:
        yield ""
        yield from rows(other, path)


def _text(value: Any) -> str:
    """As in a YAML file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def markdown() -> str:
    """The tables of all settings of `mmfree train`."""
    return "\n".join(rows(TrainConfig, ""))

"""Flags from types by tyro, with its errors as one line."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from mmfree_jax.cli.parse_errors import one_line
from mmfree_jax.cli.synonyms import find_option
from mmfree_jax.errors import ConfigError
from mmfree_jax.places import Place
from mmfree_jax.ranges import Count, Share, check_values

_TRUTHS = ("true", "false", "yes", "no", "on", "off", "0", "1")


def parse(
    target: Callable[..., Any],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: Any = tyro.MISSING_NONPROP,
) -> Any:
    """Calls `target`, a dataclass or function, with the arguments that `argv` gives.

    `--help` prints and leaves with SystemExit(0). `default` is an instance of a dataclass.

    Raises:
      ConfigError: a flag is unknown or its value malformed, a list is given in two places, or a
        number is not finite or not in the range of its annotation; the message names both.
    """
    _refuse_repeated_lists(target, argv)
    captured = io.StringIO()
    # A function is parsed apart from being called, so that what it prints is not captured.
    deferred: Callable[..., Any] = target if inspect.isclass(target) else _remember(target)

    def read() -> Any:
        captured.seek(0)
        captured.truncate()
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                deferred, args=list(argv), prog=prog, description=description, default=default
            )

    if {"-h", "--help"} & set(argv):
        try:
            read()  # as wide as the terminal is
        except SystemExit as e:
            if e.code in (0, None):
                raise
    try:
        with _wide_lines():
            result: Any = read()
    except SystemExit as e:
        if e.code in (0, None):
            raise
        if (name := _positional_as_option(target, argv)) is not None:
            raise ConfigError(
                f"unknown option --{name}: {name.upper()} is given without it, as in `{prog} "
                f"{name.upper()}`; see {prog} --help"
            ) from e
        valued = _valued_switch(target, argv)
        raise ConfigError(one_line(captured.getvalue(), prog, _meant(target, argv), valued)) from e
    sys.stderr.write(captured.getvalue())
    call = None if inspect.isclass(target) else result
    values = _fields(result) if call is None else call.keywords
    hints = typing.get_type_hints(target, include_extras=True)
    check_values(values, hints, lambda name: "--" + name.replace("_", "-"))
    return result if inspect.isclass(target) else result()


def _refuse_repeated_lists(target: Callable[..., Any], argv: Sequence[str]) -> None:
    """Of `--input a --input b` the first would be lost without a word."""
    given = [a.partition("=")[0].replace("_", "-") for a in argv if a.startswith("--")]
    for flag in (f"--{name}" for name, _, takes_several in _flags(target) if takes_several):
        if given.count(flag) > 1:
            raise ConfigError(
                f"{flag} is given {given.count(flag)} times: give it once, with all its values "
                "behind it"
            )


def _flags(target: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """The flags of a dataclass or function, without dashes: name, type, whether it takes a list."""
    plain = typing.get_type_hints(target)
    for name, marked in typing.get_type_hints(target, include_extras=True).items():
        flag, hint = f"{prefix}{name}".replace("_", "-"), plain[name]
        marks = getattr(marked, "__metadata__", ())
        if dataclasses.is_dataclass(hint):
            # tyro's name="" puts the flags of an inner dataclass beside those of the outer one.
            is_beside = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(hint, prefix if is_beside else f"{flag}.")
        elif name != "return" and tyro.conf.Positional not in marks:
            kinds = {typing.get_origin(h) for h in (hint, *typing.get_args(hint))}
            takes_several = bool(kinds & {tuple, list}) and tyro.conf.UseAppendAction not in marks
            yield flag, hint, takes_several


def _meant(target: Any, argv: Sequence[str]) -> dict[str, str]:
    """Flags in `argv` that are not ours, and which of ours has that meaning."""
    ours = [name for name, _, _ in _flags(target)]
    known = {"--" + name for name in ours} | {"--" + _negated(name) for name in ours}
    meant = {}
    for argument in argv:
        given = argument.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", given) or given.replace("_", "-") in known:
            continue
        if (option := find_option(given, ours)) is not None:
            meant[given] = f"--{option}" if len(option) > 1 else f"-{option}"
    return {given: option for given, option in meant.items() if given != option}


def _valued_switch(target: Any, argv: Sequence[str]) -> tuple[str, str] | None:
    """The two forms of a flag that is on or off, where `argv` gives it true or false; else None."""
    names = [name for name, hint, _ in _flags(target) if hint is bool]
    switches = {f"--{name}": f"--{_negated(name)}" for name in names}
    for argument, after in itertools.pairwise([*argv, ""]):
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag in switches and (value if equals else after).lower() in _TRUTHS:
            return flag, switches[flag]
    return None


def _positional_as_option(target: Any, argv: Sequence[str]) -> str | None:
    """A positional argument's name that `argv` has as an option, without dashes; else None."""
    given = {a.partition("=")[0].replace("_", "-") for a in argv}
    for name, hint in typing.get_type_hints(target, include_extras=True).items():
        flag = name.replace("_", "-")
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()) and f"--{flag}" in given:
            return flag
    return None


def _negated(flag: str) -> str:
    """log.tensorboard -> log.no-tensorboard, as tyro has it."""
    path, dot, name = flag.rpartition(".")
    return f"{path}{dot}no-{name}"


def _remember(target: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """A function of the same signature that returns the call instead of making it."""

    @functools.wraps(target)
    def remember(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(
            target, **inspect.signature(target).bind(*args, **kwargs).arguments
        )

    return remember


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@contextlib.contextmanager
def _wide_lines() -> Iterator[None]:
    """Keeps tyro from breaking words of its messages."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "500"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _list_of(kind: Callable[[str], Any], metavar: str, what: str) -> PrimitiveConstructorSpec:
    """A flag whose one value is a list separated by commas."""

    def read(texts: list[str]) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for part in texts[0].split(",") if part.strip())
        except ValueError as e:
            raise ValueError(f"{texts[0]!r}: give {what} separated by commas") from e

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


# Types of fields and parameters: A,B on the command line is ("A", "B").
Names = Annotated[tuple[str, ...], _list_of(str, "A,B,...", "names")]
Folders = Annotated[tuple[Place, ...], _list_of(str, "A,B,...", "folders")]
Shares = Annotated[tuple[Share, ...], _list_of(float, "X,X,...", "numbers")]
Counts = Annotated[tuple[Count, ...], _list_of(int, "N,N,...", "whole numbers")]

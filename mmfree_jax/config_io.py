"""Configurations to and from plain dicts and YAML, strictly.

Unknown keys are errors, and so are keys that occur twice: every YAML in the project is read by
`parse_yaml` or `read_yaml`, or looked at by `check_keys` where another library reads it.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mmfree_jax.config import OptimizerConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.places import check_local, locate
from mmfree_jax.prefixes import read_text as read_object
from mmfree_jax.presets import preset
from mmfree_jax.readable import brief
from mmfree_jax.storage import MissingError, Url
from mmfree_jax.text_files import DEEPEST, MOST_DIGITS, check_text, read_text

T = TypeVar("T")

_LARGEST = 2**22
"""Bytes of a YAML file: the reader takes some ten seconds for each 2^20."""
_MOST_VALUES = 10**6
"""That a YAML text stands for, its aliases written out."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts of plain values; tuples become lists."""
    return _plain(dataclasses.asdict(config))


# Fields that are newer than files which name a model by its fields (sessions, sweeps' tables).
_NEWER = (
    "head_dim", "attention_bias", "qk_norm", "rope_scaling", "mup", "mup_base_width",
    "output_gate", "candidate", "ternary_qk", "float_attention", "glu_activation",
    "state_expansion",
    "weight_scale",
)  # fmt: skip
_NEWER_OF_OPTIMIZER = (
    "name", "factory", "embedding_rate", "head_rate", "matrix_rate", "vector_rate",
    "second_stage_at", "second_stage_rate", "weight_decay_until",
)  # fmt: skip


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """As `to_dict`, for files that name a model: newer fields only where they say something.

    So that the files of before are still of the same model.
    """
    return _where_said(config, _NEWER)


def optimizer_identity(config: OptimizerConfig) -> dict[str, Any]:
    """As `model_identity`, of the optimiser, for tables that tell runs apart."""
    return _where_said(config, _NEWER_OF_OPTIMIZER)


def _where_said(config: ModelConfig | OptimizerConfig, newer: Collection[str]) -> dict[str, Any]:
    values, defaults = to_dict(config), to_dict(type(config)())
    return {k: v for k, v in values.items() if k not in newer or v != defaults[k]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def from_dict(cls: type[T], values: dict[str, Any], base: T | None = None, path: str = "") -> T:
    """Builds `cls` from nested dicts, over `base` (default: the class's own defaults).

    Raises:
      ConfigError: a key is unknown or a value has the wrong type; the message names it.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'config'} is {brief(values)}: give a mapping of fields")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    changes = {}
    for name, where, value in _named(values, path):
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(fields)}"
            section, dot, rest = name.partition(".")
            if dot and section in fields:
                hint = f"write {rest} indented in a line below {section}:"
            raise ConfigError(f"unknown config key {brief(where)}: {hint}")
        if dataclasses.is_dataclass(hints[name]):
            inner = _default(fields[name]) if base is None else getattr(base, name)
            changes[name] = from_dict(hints[name], value, inner, where)  # type: ignore[arg-type]
        else:
            changes[name] = _convert(hints[name], value, where)
    # Without a base the defaults alone need not be valid: what is given takes their place.
    return cls(**changes) if base is None else dataclasses.replace(base, **changes)  # type: ignore[type-var]


def underscored(values: dict[Any, Any], path: str) -> dict[str, Any]:
    """Nested settings with the fields' own names: YAML may spell them as flags, with dashes.

    Args:
      values: settings, not looked at any further.
      path: where they stand, for messages.

    Raises:
      ConfigError: a field is there in both spellings.
    """
    return {
        name: underscored(value, where) if isinstance(value, dict) else value
        for name, where, value in _named(values, path)
    }


def _named(values: dict[Any, Any], path: str) -> Iterator[tuple[str, str, Any]]:
    """The field's own name of each key, where it stands, and its value."""
    seen = set()
    for key, value in values.items():
        name = str(key).replace("-", "_")
        where = f"{path}.{name}" if path else name
        if name in seen:
            raise ConfigError(
                f"config key {brief(where)} occurs twice, as {brief(key)} too: keep one"
            )
        seen.add(name)
        yield name, where, value


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default  # type: ignore[misc]


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks a value against its annotation, allowing only lossless conversions."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path=where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _convert(hint, value, where)
    if origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {brief(value)}: choose one of {', '.join(map(str, args))}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {brief(value)}: give a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{where} is {brief(value)}: give a list of {len(args)} values")
        element_hints = args if args[-1] is not Ellipsis else [args[0]] * len(value)
        pairs = enumerate(zip(element_hints, value, strict=True))
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in pairs)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML reads 3e-4 as a string
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {brief(value)}: give a value of type {hint.__name__}")


class _StrictLoader(yaml.SafeLoader):
    """YAML of plain values, where a key may occur once in a mapping (`<<` merges as ever)."""

    def get_single_node(self) -> yaml.Node | None:
        """Checks how much the text stands for, before anything is made of it."""
        node = super().get_single_node()
        if node is not None:
            _check_nodes(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks keys as they are written: merging adds others to the node later."""
        node = super().compose_mapping_node(anchor)
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in seen:
                raise yaml.YAMLError(
                    f"key {brief(name)} occurs twice, in lines {seen[name]} and {line}: keep one"
                )
            seen[name] = line
        return node

    def construct_yaml_int(self, node: Any) -> int:
        """Of a length that any field could hold."""
        if len(node.value) > MOST_DIGITS:
            raise yaml.YAMLError(
                f"a whole number of {len(node.value)} digits in line {node.start_mark.line + 1}"
            )
        return _as_it_reads(node, super().construct_yaml_int(node))

    def construct_yaml_float(self, node: Any) -> float:
        """Of digits alone, and no time of day."""
        return _as_it_reads(node, super().construct_yaml_float(node))


def _as_it_reads(node: yaml.ScalarNode, value: T) -> T:
    """`value`, unless it is another than the digits say: YAML 1.1 takes 010 for 8, 1:30 for 90.

    Raises:
      YAMLError: it is.
    """
    text = node.value.replace("_", "")
    octal = re.fullmatch(r"[-+]?0[0-7]+", text) is not None and int(text) != value
    if octal or ":" in text:
        raise yaml.YAMLError(
            f"{node.value} in line {node.start_mark.line + 1} is {value} in YAML, "
            f"{'an octal number' if octal else 'counted in sixties'}: write it without "
            f"{'the leading 0' if octal else 'the colon'}, or in quotes if it is a text"
        )
    return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _check_nodes(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values that a node stands for with its aliases written out, and their depth.

    A few lines of aliases stand for more than any memory, or for themselves.

    Args:
      node: of the text.
      known: what was found for nodes before, by id; None: not done yet.

    Raises:
      YAMLError: too many, too deep, an alias of itself, or a string that is no text.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise yaml.YAMLError("an alias stands for itself")
        return found
    known[id(node)] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif "\0" in node.value:
        raise yaml.YAMLError(f"a NUL in a string in line {node.start_mark.line + 1}")
    else:
        check_text(node.value)
    count, depth = 1, 0
    for part in inner:
        values, levels = _check_nodes(part, known)
        count, depth = count + values, max(depth, levels + 1)
    if count > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    if depth > DEEPEST:
        raise RecursionError
    known[id(node)] = count, depth
    return count, depth


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds, unchecked; None if it is empty.

    Args:
      text: the YAML.
      source: names it in errors.

    Raises:
      ConfigError: it is not YAML, or a key occurs twice in a mapping.
    """
    return _parse(text, source)


def _parse(text: str, source: str, *, keys_only: bool = False) -> Any:
    try:
        if keys_only:
            return yaml.compose(text, _StrictLoader)
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # 2024-13-01 is a ValueError
        too_deep = isinstance(e, RecursionError)
        reason = f"nested more than {DEEPEST} deep" if too_deep else " ".join(str(e).split())
        raise ConfigError(f"{source} is not valid YAML: {reason[:500]}") from e


def check_keys(path: str | os.PathLike[str]) -> None:
    """Refuses a YAML file that others will read, tags of their own and all, if a key occurs twice.

    Raises:
      ConfigError: the file cannot be read or is not YAML, or a key occurs twice.
    """
    _read(path, keys_only=True)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What a YAML file holds, unchecked; None if it is empty.

    Raises:
      ConfigError: the file cannot be read or is not YAML, or a key occurs twice.
    """
    return _read(path)


def _read(path: str | os.PathLike[str], *, keys_only: bool = False) -> Any:
    check_local(path, "config file")
    try:
        text = read_text(path, _LARGEST)
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror}; give a readable YAML file") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"config file {path} is not valid YAML: {e}") from e
    return _parse(text, f"config file {path}", keys_only=keys_only)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file, or in one by its URL, not looked at any further.

    Raises:
      ConfigError: the file is missing or no mapping.
      StorageError: the bucket refuses, or cannot be reached.
    """
    place = locate(path, "config file")
    values = read_yaml(path) if isinstance(place, Path) else _read_object(place)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: give a mapping of fields, not {brief(values)}")
    return values


def _read_object(url: Url) -> Any:
    try:
        text = read_object(url, _LARGEST)
    except MissingError as e:
        raise ConfigError(f"config file {e}: give a readable YAML file") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"config file {url} is not valid YAML: {e}") from e
    return _parse(text, f"config file {url}")


def with_settings(
    values: dict[str, Any], path: str | os.PathLike[str], base: TrainConfig | None = None
) -> TrainConfig:
    """A training configuration: `base`, or what the key `preset` names, under a file's settings.

    Raises:
      ConfigError: a field is unknown or malformed.
    """
    name = values.get("preset")
    if base is None:
        base = TrainConfig() if name is None else preset(str(name))
    try:
        given = {key: value for key, value in values.items() if key != "preset"}
        return from_dict(TrainConfig, given, base)
    except ConfigError as e:
        raise ConfigError(f"config file {path}: {e}") from e


def dump_yaml(config: Any) -> str:
    """The configuration as YAML text, every field resolved; `read_settings` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)

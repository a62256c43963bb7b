"""Which split of a data set a file belongs to: by its name, or by the repository's README.

The rules are those of Hugging Face's `datasets`, but cautious: there a folder with one
`test.txt` among a thousand texts is a test split of one document.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mmfree_jax.config_io import parse_yaml
from mmfree_jax.errors import DataError
from mmfree_jax.text_files import read_text

TRAIN, ALL = "train", "all"
README = "README.md"
_KEYWORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("heldout", "holdout"), "heldout"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_NUMBERS = re.compile(r"([-_. ]?\d+)?([-_.]of[-_.]\d+)?$")
_PLAIN, _LIKELY, _SHARDED = 2, 1, 0


def canonical(split: str) -> str:
    """The usual name of a split: "val", "valid" and "dev" are validation."""
    return _KEYWORDS.get(split.lower(), split)


def _named(path: PurePath) -> tuple[str, int] | None:
    """The split that a path names, and how plainly."""
    *folders, name = path.parts
    stem = name.split(".")[0] if not _SHARD.match(name) else name
    for folder in folders:
        if folder.lower() in _KEYWORDS:
            return _KEYWORDS[folder.lower()], _PLAIN
    bare = _NUMBERS.sub("", stem).lower()
    if bare in _KEYWORDS:
        return _KEYWORDS[bare], _PLAIN
    shard = _SHARD.match(name)
    if shard and _words(shard[1]):
        return canonical(shard[1]), _PLAIN
    for part in (*folders, name):
        if words := _words(part):
            return words[0], _LIKELY
    return (shard[1], _SHARDED) if shard else None


def _words(text: str) -> list[str]:
    words = re.split(r"[-._= \d]+", text.lower())
    return [_KEYWORDS[word] for word in words if word in _KEYWORDS]


def splits_by_name(paths: Sequence[PurePath]) -> dict[PurePath, str | None]:
    """The split of each path below one folder; None where its name says none.

    A file is called `train`, `validation-00000-of-00001` or the like, or lies in a folder that
    is. Where some say train and others another split, a word inside a name is enough, as in
    `wiki.test.raw.txt`, and each set of shards is a split.
    """
    named = {path: _named(path) for path in paths}
    likely = {name[0] for name in named.values() if name and name[1] >= _LIKELY}
    least = _SHARDED if TRAIN in likely and len(likely) > 1 else _PLAIN
    return {path: name[0] if name and name[1] >= least else None for path, name in named.items()}


@dataclass(frozen=True)
class Subset:
    """A configuration in a data set's README."""

    name: str
    is_default: bool
    splits: dict[str, tuple[str, ...]]
    """Patterns of the files of each split."""
    folder: str | None
    """Its `data_dir`, where files say their split by name."""


def read_subsets(folder: Path) -> list[Subset]:
    """The `configs` in the front matter of a data set's README.md; none if it has none.

    Raises:
      DataError: the front matter is not YAML, or a key occurs twice.
      ConfigError: likewise.
    """
    file = folder / README
    try:
        text = read_text(file)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file} cannot be read ({e}): repair or remove it") from e
    front = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    if not front or not re.search(r"^configs\s*:", front[1], re.MULTILINE):
        return []
    values = parse_yaml(front[1], f"the front matter of {file}")
    configs = values.get("configs") if isinstance(values, dict) else None
    found = []
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict):
            continue
        folder_name = config.get("data_dir")
        splits = _data_files(config.get("data_files"), folder_name)
        if splits or folder_name:
            name = str(config.get("config_name", "default"))
            default = config.get("default") is True or name == "default"
            found.append(Subset(name, default, splits, folder_name and str(folder_name)))
    return found


def _data_files(value: Any, folder: Any) -> dict[str, tuple[str, ...]]:
    """The patterns of each split, of the forms that Hugging Face reads."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
        pairs = [(v.get("split", TRAIN), v.get("path")) for v in value]
    else:
        pairs = [(TRAIN, value)]
    splits: dict[str, tuple[str, ...]] = {}
    for split, patterns in pairs:
        several = patterns if isinstance(patterns, list) else [patterns]
        name = canonical(str(split))
        prefix = f"{folder}/" if folder else ""
        splits[name] = splits.get(name, ()) + tuple(
            prefix + p for p in several if isinstance(p, str)
        )
    return {split: patterns for split, patterns in splits.items() if patterns}

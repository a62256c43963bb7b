"""`index.json` of a prepared folder: what the data set is, and which shards it has."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax import prefixes
from mmfree_jax.data.shards import TOKEN_DTYPES, ShardInfo, made_again
from mmfree_jax.errors import DataError
from mmfree_jax.json_shape import digest, fault
from mmfree_jax.places import locate
from mmfree_jax.storage import MissingError, Url
from mmfree_jax.text_files import read_json

INDEX_NAME = "index.json"
FORMAT = "mmfree-tokens"
FORMAT_VERSION = 1
_SELF = "sha256"
_UNFINISHED = (
    f"data folder {{}} has no {INDEX_NAME}, so it is unfinished or not a prepared data set: run "
    "`mmfree data prepare` to the end (it resumes)"
)


@dataclass(frozen=True)
class DatasetIndex:
    """The contents of `index.json`."""

    path: Path | Url
    """The prepared folder, or its URL."""
    tokenizer: dict[str, Any]
    """The tokenizer's identity: kind, vocab_size, sha256, bos_id, eos_id."""
    token_dtype: str
    """"uint16" or "uint32"."""
    splits: dict[str, tuple[ShardInfo, ...]]
    """The shards of each split, in order."""
    source: dict[str, Any]
    """How the folder was made: settings, and counts of what was read and left out."""


def load_index(path: str | os.PathLike[str]) -> DatasetIndex:
    """Reads `index.json` of a prepared folder.

    Raises:
      DataError: the folder is missing, unfinished, damaged or of another format version.
      ConfigError: it is a URL of what is no bucket.
      StorageError: the bucket cannot be read.
    """
    folder = locate(path, "data folder")
    file = folder / INDEX_NAME
    try:
        values = _read_local(folder) if isinstance(folder, Path) else _read_object(folder)
    except ValueError as e:
        raise DataError(f"{file} is damaged ({e}): {made_again(folder)}") from e
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"{file} is not the index of a prepared data set: give another folder")
    if values.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {values.get('version')!r}, this program reads "
            f"{FORMAT_VERSION}: {made_again(folder)}"
        )
    # Indices of older versions have no checksum.
    if (own := values.pop(_SELF, None)) is not None and own != digest(values):
        raise DataError(
            f"{file} is damaged (it does not match its own checksum): {made_again(folder)}"
        )
    try:
        index = DatasetIndex(
            path=folder,
            tokenizer=dict(values["tokenizer"]),
            token_dtype=values["token_dtype"],
            splits={
                name: tuple(ShardInfo(**shard) for shard in split["shards"])
                for name, split in values["splits"].items()
            },
            source=dict(values.get("source", {})),
        )
        _ = TOKEN_DTYPES[index.token_dtype]
        if wrong := _fault(index):
            raise TypeError(wrong)
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f"{file} is damaged (missing or malformed field: {e}): {made_again(folder)}"
        ) from e
    return index


def _read_local(folder: Path) -> Any:
    from mmfree_jax.data.mqar import is_mqar  # which imports this module

    if is_mqar(str(folder)):
        raise DataError(
            f"data {folder} is a task whose rows are made as they are read, without documents: "
            "train on it, and score models with `mmfree eval mqar`; here give a prepared folder"
        )
    if not folder.is_dir():
        raise DataError(
            f"data folder {folder} does not exist: make it with `mmfree data prepare --out "
            f"{folder}`"
        )
    try:
        return read_json(folder / INDEX_NAME)
    except FileNotFoundError as e:
        raise DataError(_UNFINISHED.format(folder)) from e
    except OSError as e:
        raise DataError(f"{folder / INDEX_NAME}: {e.strerror}; make it readable") from e


def _read_object(url: Url) -> Any:
    try:
        return prefixes.read_json(url / INDEX_NAME)
    except MissingError as e:
        what = prefixes.describe_missing(url)
        raise DataError(f"data folder {what}" if what else _UNFINISHED.format(url)) from e


def _fault(index: DatasetIndex) -> str | None:
    """What is wrong with the types of an index that has no checksum; None: nothing."""
    wanted = {field.name: field.type for field in dataclasses.fields(ShardInfo)}
    shards = [vars(shard) for split in index.splits.values() for shard in split]
    wrong = fault(index.tokenizer, {"vocab_size": int}) or fault(shards, [wanted])
    for shard in () if wrong else shards:
        if min(shard["tokens"], shard["documents"], shard["bytes"]) < 0:
            return "a count is below 0"
        if Path(shard["name"]).name != shard["name"]:
            return f"shard {shard['name']!r} is not in the folder"
    return wrong


def index_to_json(index: DatasetIndex) -> str:
    """The text of `index.json`, with totals for readers."""
    splits = {}
    for name, shards in index.splits.items():
        splits[name] = {
            "tokens": sum(s.tokens for s in shards),
            "documents": sum(s.documents for s in shards),
            "bytes": sum(s.bytes for s in shards),
            "shards": [vars(s) for s in shards],
        }
    values = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tokenizer": index.tokenizer,
        "token_dtype": index.token_dtype,
        "splits": splits,
        "source": index.source,
    }
    values = json.loads(json.dumps(values))  # what a reader finds, tuples as lists
    return json.dumps(values | {_SELF: digest(values)}, indent=1) + "\n"

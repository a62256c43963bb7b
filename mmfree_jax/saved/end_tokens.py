"""The token ids that a model's folder says end a text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.files import write_text
from mmfree_jax.text_files import read_json

GENERATION = "generation_config.json"


def end_ids(folder: str | Path) -> tuple[int, ...]:
    """The `eos_token_id`, a number or a list, of generation_config.json, else of config.json.

    As in transformers 5, a generation_config.json stands in config.json's place, also where it
    names no id. Empty where a folder has neither; the tokenizer's own end token is not looked at.

    Raises:
      ConfigError: the file is malformed, or an id is no whole number of 0 or more.
    """
    for name in (GENERATION, "config.json"):
        if (file := Path(folder) / name).is_file():
            return _ids(file)
    return ()


def _ids(file: Path) -> tuple[int, ...]:
    try:
        fields = read_json(file)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read ({e}): repair or remove it") from e
    value = fields.get("eos_token_id") if isinstance(fields, dict) else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or token < 0:
            raise ConfigError(
                f"{file}: eos_token_id is {value!r}: give a token id or a list of them"
            )
    return tuple(dict.fromkeys(ids))


def write_end_ids(folder: Path, ids: Sequence[int], **others: Any) -> None:
    """Writes generation_config.json into a folder of ours; one id is written as a number.

    Args:
      folder: of the model.
      ids: that end a text.
      others: further fields; None is left out.
    """
    fields = {name: value for name, value in others.items() if value is not None}
    if ids:
        fields["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids)
    write_text(folder / GENERATION, json.dumps(fields, indent=2) + "\n")

"""Start and end tokens by their names, and text that spells one. Nothing here imports JAX."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmfree_jax.errors import DataError
from mmfree_jax.text_files import read_json

BOS_TOKEN, EOS_TOKEN = "<|bos|>", "<|eos|>"
"""Names of the special tokens of a BPE trained here (ids 0 and 1)."""
# Start and end tokens by name, where no tokenizer_config.json decides.
_COMMON_BOS = (BOS_TOKEN, "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
_COMMON_EOS = (EOS_TOKEN, "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
BY_NAME = "by name"
"""Instead of a start or end token: the first of the usual names that the vocabulary holds."""
CONFIG = "tokenizer_config.json"
CONFIGS = (CONFIG, "special_tokens_map.json")
_CLASSES_WITHOUT_DEFAULTS = ("PreTrainedTokenizerFast", "TokenizersBackend")


def resolve_ends(
    bos_token: str | None, eos_token: str | None, vocabulary: Collection[str]
) -> tuple[str | None, str | None]:
    """Start and end token, where each may be `BY_NAME`."""
    bos, eos = (
        next((name for name in common if name in vocabulary), None) if token is BY_NAME else token
        for token, common in ((bos_token, _COMMON_BOS), (eos_token, _COMMON_EOS))
    )
    return bos, eos


def named_ends(folder: Path) -> tuple[str | None, str | None]:
    """Start and end token by the files in `folder`, as transformers reads them.

    `tokenizer_config.json` decides, and the older `special_tokens_map.json` where a key is not
    in it. null is no token. A key that is in neither is none too for the general class; others
    have defaults of their own, which go by the usual names, as where there is no file.
    """
    config, older = (_fields(folder / name) for name in CONFIGS)
    general = config and config.get("tokenizer_class") in _CLASSES_WITHOUT_DEFAULTS
    names: list[str | None] = []
    for key in ("bos_token", "eos_token"):
        value = (older | config).get(key, None if general else BY_NAME)
        name = value.get("content") if isinstance(value, dict) else value
        if not isinstance(name, str | None) or (isinstance(value, dict) and name is None):
            raise DataError(
                f"{folder / CONFIG}: {key} is {value!r}: give a token's text, or null for none"
            )
        names.append(name)
    return names[0], names[1]


def _fields(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    try:
        fields = read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read ({e}): repair or remove it") from e
    if not isinstance(fields, dict):
        raise DataError(f"{file} is not a mapping of fields: repair or remove it")
    return fields


def spell(
    special: Iterable[int | None], ids: Mapping[str, int], unk_id: int | None
) -> dict[int, list[int]]:
    """For each special id the ids that spell its text: characters, bytes, or the unknown token.

    Most models never make a special token from text; those that list it among their words do.
    """
    unknown = [] if unk_id is None else [unk_id]
    spelled = {}
    for name, i in ids.items():
        if i not in special or i == unk_id:
            continue
        spelled[i] = parts = []
        for character in name:
            one = ids.get(character)
            if one is not None and one not in special:
                parts.append(one)
                continue
            pieces = [ids.get(f"<0x{byte:02X}>") for byte in character.encode()]
            whole = all(p is not None and p not in special for p in pieces)
            parts += [p for p in pieces if p is not None] if whole else unknown
    return spelled


def as_text(ids: list[int], spelled: Mapping[int, list[int]]) -> list[int]:
    """`ids`, where a special token that the text spelled is spelled out."""
    if spelled.keys().isdisjoint(ids):
        return ids
    return [part for i in ids for part in spelled.get(i, (i,))]

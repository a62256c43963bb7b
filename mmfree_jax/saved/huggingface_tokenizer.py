"""Tokenizers as transformers reads them: with the start token that a run was trained with.

Every tokenizer of a run gives its start token to each document, if it has one. What is written
here does the same by itself, so that other programs feed the model what it has learnt on.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from mmfree_jax.data.pieces import byte_level_alphabet
from mmfree_jax.files import write_text

TOKENIZER_MODELS = ("tokenizer.model", "tokenizer.json")
FILES = (
    *TOKENIZER_MODELS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def write_tokenizer(
    folder: Path, tokenizer: Any, max_length: int, *, originals: Path | None = None
) -> None:
    """Puts a tokenizer's files beside the weights, as transformers' AutoTokenizer reads them.

    Args:
      folder: of the export.
      tokenizer: of `mmfree_jax.data.tokenizer`, any kind.
      max_length: of the rows that the model was trained on (tokens).
      originals: folder of an imported model, whose files are kept as they are; None: the
        tokenizer of a run.
    """
    kept = [name for name in FILES if originals is not None and (originals / name).is_file()]
    for name in kept:
        assert originals is not None
        shutil.copyfile(originals / name, folder / name)
    if "tokenizer_config.json" in kept:
        return
    if tokenizer.kind == "sentencepiece":
        tokenizer.save(folder)
        names = _sentencepiece_names(tokenizer)
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    else:
        text = _byte_json(tokenizer) if tokenizer.kind == "byte" else tokenizer.text
        description = json.loads(text)
        names = _json_names(tokenizer, description)
        _spell_special(description)
        description["post_processor"] = _start_with(names.get("bos_token"), tokenizer.bos_id)
        write_text(folder / "tokenizer.json", json.dumps(description, ensure_ascii=False) + "\n")
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": None,
        "model_max_length": max_length,
        "pad_token": None,
        # Text that spells a special token stays text.
        "split_special_tokens": True,
        **names,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)


def _start_with(bos: str | None, bos_id: int | None) -> dict[str, Any] | None:
    """A post-processor that puts the start token first; None where there is none."""
    if bos is None or bos_id is None:
        return None
    start, first = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _spell_special(description: dict[str, Any]) -> None:
    """Takes special tokens out of what is looked for in texts, where a BPE keeps their ids.

    A piece that no merge makes is never encoded. transformers makes the start and end token
    special again by their names in tokenizer_config.json, for decoding.
    """
    model = description["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges"):
        return
    vocab, kept = model["vocab"], []
    for token in description.get("added_tokens", ()):
        name, id_ = token["content"], token["id"]
        if token.get("special") and vocab.get(name, id_) == id_:
            vocab[name] = id_
        else:
            kept.append(token)
    description["added_tokens"] = kept


def _json_names(tokenizer: Any, description: dict[str, Any]) -> dict[str, str]:
    names = {id_: piece for piece, id_ in _vocabulary(description)}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {key: names[id_] for key, id_ in ends.items() if id_ is not None}


def _vocabulary(description: dict[str, Any]) -> list[tuple[str, int]]:
    vocab = description["model"]["vocab"]
    if isinstance(vocab, dict):
        pieces = list(vocab.items())
    else:  # Unigram: pieces and their scores, in the order of the ids
        pieces = [(piece, i) for i, (piece, _) in enumerate(vocab)]
    return pieces + [(t["content"], t["id"]) for t in description.get("added_tokens", ())]


def _byte_json(tokenizer: Any) -> str:
    """The byte tokenizer as a BPE without merges: 256 pieces, a byte each, and the two ends."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from mmfree_jax.data.special_tokens import BOS_TOKEN, EOS_TOKEN

    vocab = dict(sorted(byte_level_alphabet().items(), key=lambda pair: pair[1]))
    vocab |= {BOS_TOKEN: tokenizer.bos_id, EOS_TOKEN: tokenizer.eos_id}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return bpe.to_str()


def _sentencepiece_names(tokenizer: Any) -> dict[str, str]:
    """Names of a SentencePiece model's start, end and unknown tokens."""
    fields = {"bos_token": "bos_id", "eos_token": "eos_id", "unk_token": "unk_id"}
    return {
        name: tokenizer.piece(id_)
        for name, field in fields.items()
        if (id_ := getattr(tokenizer, field)) is not None
    }


def _write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")

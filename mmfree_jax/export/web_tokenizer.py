"""Tokenizers for the web page: one JSON file that needs no SentencePiece and no Python.

The page encodes with the npm package @huggingface/tokenizers, which reads Hugging Face's
`tokenizer.json`; a SentencePiece model is rewritten as one. It decodes with a table from id to
bytes, so that a character of several tokens streams as soon as it is whole. The file carries a
few texts with their ids, and the page refuses to start where its own ids differ.
"""

import base64
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmfree_jax.data.json_tokenizer import JsonTokenizer
from mmfree_jax.data.pieces import byte_level_bytes
from mmfree_jax.data.tokenizer import BYTE, Tokenizer
from mmfree_jax.errors import DataError
from mmfree_jax.infer.text import start_tokens

FORMAT, VERSION = "mmfree-web-tokenizer", 1

CHECKS = (
    "Hello, world",
    "My fellow citizens, we hold these truths to be self-evident.",
    " leading and  double   spaces ",
    "a\r\n\tb\n\n\nc",
    "naïve façade, Ünïcödé",
    "日本語と한국어 и русский",
    "🙂👩‍👩‍👧 🇫🇷",
    "e\u0301 \u00a0 \u200b \ufeff",
    "1234567 3.14 x==y; def f(x): return x**2",
    "<s> </s> <unk> <0x41> <|bos|> <|eos|>",
    "▁ ▁▁ ________",
    "I'll we've DON'T",
    "\U0001f9ec\U00013080",
)
"""Texts whose ids the page compares with Python's when it starts."""

_SPACE = "\u2581"  # SentencePiece's sign for a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2


def browser_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the page needs of a tokenizer, as JSON values.

    Args:
      tokenizer: bytes, or a BPE: a SentencePiece model that leaves the text as it is, or a
        tokenizer.json whose decoder is byte-level or SentencePiece's.

    Returns:
      format, version, kind ("byte" or "json"), vocab_size, bos_id, eos_id,
      start_ids: what an empty prompt stands for,
      strip_space: whether the first space of a document belongs to the tokenizer,
      encoder: the contents of a tokenizer.json, None for bytes,
      bytes: base64 of the bytes of each id, None for special tokens,
      checks: pairs of a text and its ids.

    Raises:
      DataError: the page has no means for this tokenizer.
    """
    if tokenizer.kind == BYTE:
        encoder, pieces, strip = None, [bytes([i]) for i in range(256)], False
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            if isinstance(tokenizer, JsonTokenizer):
                text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
                encoder = json.loads(text)
                pieces, strip = _json_pieces(encoder, tokenizer.vocab_size)
                encoder = _without_special_tokens(encoder)
            else:
                proto = (Path(folder) / "tokenizer.model").read_bytes()
                encoder, pieces, strip = _from_sentencepiece(proto)
    pieces = [*pieces, *[None] * (tokenizer.vocab_size - len(pieces))]
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": BYTE if encoder is None else "json",
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "start_ids": start_tokens(tokenizer),
        "strip_space": strip,
        "encoder": encoder,
        "bytes": [None if p is None else base64.b64encode(p).decode() for p in pieces],
        "checks": [[text, tokenizer.encode(text)] for text in CHECKS],
    }


def _from_sentencepiece(proto: bytes) -> tuple[dict[str, Any], list[bytes | None], bool]:
    """A SentencePiece model as tokenizer.json, the bytes of its ids, and its dummy prefix."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    refusals = {
        f"model type {trainer.model_type}": trainer.model_type != _BPE,
        "a character map (normalization_rule_name)": bool(normalizer.precompiled_charsmap),
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "white space as suffix": trainer.treat_whitespace_as_suffix,
        "white space that is not escaped": not normalizer.escape_whitespaces,
        "user-defined pieces": any(p.type == _USER_DEFINED for p in model.pieces),
        "unused pieces": any(p.type == _UNUSED for p in model.pieces),
    }
    for what, found in refusals.items():
        if found:
            raise DataError(
                f"the SentencePiece model has {what}, which the web page cannot read: use one of "
                "type BPE that leaves the text as it is, or export with --no-web"
            )
    # Control tokens keep their ids under names that no text holds: "</s>" in a text is text.
    names = [
        f"\uffff{i}" if piece.type == _CONTROL else piece.piece
        for i, piece in enumerate(model.pieces)
    ]
    unknown = next((i for i, p in enumerate(model.pieces) if p.type == _UNKNOWN), None)
    vocabulary = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else names[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": trainer.byte_fallback,
        "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": _merges((p.piece, p.score) for p in model.pieces if p.type == _NORMAL),
    }
    encoder = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": _normalizers(normalizer.add_dummy_prefix),
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": vocabulary,
    }
    pieces = [_sentencepiece_bytes(piece, trainer.unk_surface) for piece in model.pieces]
    return encoder, pieces, normalizer.add_dummy_prefix


def _normalizers(dummy_prefix: bool) -> list[dict[str, Any]]:
    """How SentencePiece writes spaces, in the terms of tokenizer.json."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    return [{"type": "Prepend", "prepend": _SPACE}, *steps] if dummy_prefix else steps


def _merges(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first, as SentencePiece merges.

    Pairs that make the same piece are ranked by their longer left half; SentencePiece takes the
    leftmost of overlapping ones, which in runs of one character is the same.
    """
    scored = list(pieces)
    known = {piece for piece, _ in scored}
    merges = []
    for piece, _ in sorted(scored, key=lambda item: -item[1]):
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in known and piece[cut:] in known:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def _sentencepiece_bytes(piece: Any, unknown: str) -> bytes | None:
    """The bytes that a piece adds to a text; None for control tokens."""
    if piece.type == _CONTROL:
        return None
    if piece.type == _BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    if piece.type == _UNKNOWN:
        return unknown.encode()
    return piece.piece.replace(_SPACE, " ").encode()


def _without_special_tokens(encoder: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that reads special tokens in a text as text, and adds none."""
    ordinary = [t for t in encoder.get("added_tokens") or () if not t.get("special")]
    return encoder | {
        "added_tokens": ordinary,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "decoder": None,
    }


def _json_pieces(encoder: dict[str, Any], size: int) -> tuple[list[bytes | None], bool]:
    """The bytes of each id of a tokenizer.json, and whether its decoder strips a first space."""
    if encoder["model"].get("type") != "BPE":
        raise DataError(
            f"the tokenizer.json has a model of type {encoder['model'].get('type')}, which the web "
            "page cannot read: use a BPE, or export with --no-web"
        )
    decoder = encoder.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        render = byte_level_bytes
    elif set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:

        def render(piece: str) -> bytes:
            if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(_SPACE, " ").encode()

    else:
        raise DataError(
            f"the tokenizer.json has the decoder {'+'.join(map(str, kinds))}, which the web page "
            "cannot read: use a byte-level or SentencePiece tokenizer, or export with --no-web"
        )
    added = encoder.get("added_tokens") or ()
    outside = {t["id"] for t in added}
    pieces: list[bytes | None] = [None] * size
    for token, i in encoder["model"]["vocab"].items():
        if i not in outside:
            pieces[i] = render(token)
    for token in added:
        if not token.get("special"):
            pieces[token["id"]] = token["content"].encode()
    strip = any(
        (step.get("type") == "Strip" and step.get("start", 0) > 0)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return pieces, strip

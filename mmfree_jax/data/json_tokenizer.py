"""Hugging Face's tokenizer.json as a tokenizer."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfree_jax.data.pieces import byte_level_alphabet, byte_level_bytes, piece_bytes
from mmfree_jax.data.special_tokens import BY_NAME, as_text, resolve_ends, spell
from mmfree_jax.data.text_segments import segments, utf8
from mmfree_jax.errors import DataError
from mmfree_jax.files import write_bytes, write_text
from mmfree_jax.text_files import decode_text, parse_json

if TYPE_CHECKING:
    import tokenizers

_SEGMENT = 2**16
"""Characters after which a long text is cut."""


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`; also what `train_bpe.py` makes."""

    def __init__(
        self,
        text: bytes,
        bos_token: str | None = BY_NAME,
        eos_token: str | None = BY_NAME,
        source: str = "the tokenizer.json",
    ) -> None:
        """Loads a tokenizer.

        Args:
          text: the contents of a `tokenizer.json`.
          bos_token: the start token; None: there is none; `BY_NAME`: the usual names are tried.
          eos_token: the end token, likewise.
          source: names it in errors.
        """
        import tokenizers

        try:
            plain = decode_text(text)
            self._text = plain.encode()
            self._tokenizer = tokenizers.Tokenizer.from_str(plain)
            description = parse_json(plain)
            model = description["model"]
        except Exception as e:  # `tokenizers` raises bare Exception
            raise DataError(
                f"{source} is not a Hugging Face tokenizer.json ({e}): give another file"
            ) from e
        self._source = source
        self._tokenizer.encode_special_tokens = True  # as text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        # GPT-2's pattern ends a word before white space, and starts anew there.
        before = description.get("pre_tokenizer") or {}
        self._can_cut = (
            before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and not before.get("add_prefix_space")
            and not description.get("normalizer")
            and all(token.get("special") for token in description.get("added_tokens", ()))
        )
        self.kind = str(model.get("type", "huggingface")).lower()
        self.vocab_size = max(ids.values(), default=-1) + 1
        if not ids:
            raise DataError(f"{source} has no tokens: give another file")
        self._bos, self._eos = resolve_ends(bos_token, eos_token, ids)
        for token in (self._bos, self._eos):
            if token is not None and token not in ids:
                raise DataError(
                    f"{source} has no token {token!r}, which tokenizer_config.json names"
                )
        # Left out when decoding, also where the file does not list them.
        self._tokenizer.add_special_tokens([t for t in (self._bos, self._eos) if t is not None])
        self.bos_id = ids[self._bos] if self._bos is not None else None
        self.eos_id = ids[self._eos] if self._eos is not None else None
        unknown = model.get("unk_token")
        if unknown is None and model.get("unk_id") is not None:  # Unigram gives its place
            unknown = model["vocab"][model["unk_id"]][0]
        self.unk_id = None if unknown is None else ids.get(unknown)
        self._lost = _LostCharacters(self._tokenizer, description, ids)
        added = {t["content"] for t in description.get("added_tokens", ()) if t.get("special")}
        special = {ids[t] for t in added if t in ids} | {self.bos_id, self.eos_id}
        self.special_tokens: Mapping[str, int] = {t: i for t, i in ids.items() if i in special}
        self._byte_level = "ByteLevel" in json.dumps(description.get("decoder"))
        self._spelled = spell(special, ids, self.unk_id)
        digest = hashlib.sha256(self._text)
        digest.update(f" bos {self.bos_id} eos {self.eos_id}".encode())
        self.sha256 = digest.hexdigest()

    @property
    def text(self) -> str:
        """The contents of the `tokenizer.json`."""
        return self._text.decode()

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
          DataError: it is no text, or has what the file says no token for, not even an unknown one.
        """
        utf8(text)
        try:
            # The fast variant leaves out offsets, which nobody reads here.
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as e:  # `tokenizers` raises bare Exception
            raise DataError(f"{self._source} cannot encode a text ({e}): give another file") from e
        return as_text(ids, self._spelled)

    def count_lost(self, text: str) -> int:
        """Characters of a text that no id stands for: the library drops them without a word."""
        return self._lost.count(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, int32."""
        if not self._can_cut:
            return np.array(self.encode(text), np.int32)
        # `tokenizers` keeps some 150 bytes a token until a text is done.
        parts = [np.array(self.encode(s), np.int32) for s in segments(text, _SEGMENT)]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids beyond the vocabulary are left out."""
        # A start or end token need not be marked as special in the file.
        kept = [i for i in map(int, ids) if i not in (self.bos_id, self.eos_id)]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """What one id stands for."""
        piece = self._tokenizer.id_to_token(token) or ""
        if self._byte_level and piece not in self.special_tokens:
            return byte_level_bytes(piece)
        return piece_bytes(piece)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        write_text(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
        write_bytes(Path(folder) / "tokenizer.json", self._text)


class _LostCharacters:
    """Finds the characters that a BPE without an unknown token drops.

    It splits words into single characters before it merges any, so that one that is no token by
    itself is lost; with `byte_fallback` only where a token of its bytes is missing too.
    """

    def __init__(
        self,
        tokenizer: "tokenizers.Tokenizer",
        description: Mapping[str, Any],
        ids: Mapping[str, int],
    ) -> None:
        """Keeps what decides.

        Args:
          tokenizer: the library's.
          description: the contents of its `tokenizer.json`.
          ids: all its tokens.
        """
        self._tokenizer, self._ids = tokenizer, ids
        model = description["model"]
        affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
        before = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
        has_bytes = "ByteLevel" in before and all(c in ids for c in byte_level_alphabet())
        is_bpe = model.get("type", "BPE") == "BPE" and not any(affixes)
        self._drops = is_bpe and model.get("unk_token") is None and not has_bytes
        self._falls_back = bool(model.get("byte_fallback"))
        self._kept: dict[str, bool] = {}

    def count(self, text: str) -> int:
        """Characters of a text, as the file normalises it, that no token stands for."""
        if not self._drops:
            return 0
        normalizer = self._tokenizer.normalizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return sum(text.count(character) for character in set(text) if not self._keeps(character))

    def _keeps(self, character: str) -> bool:
        kept = self._kept.get(character)
        if kept is None:
            splitter = self._tokenizer.pre_tokenizer
            split = (
                [(character, None)] if splitter is None else splitter.pre_tokenize_str(character)
            )
            kept = self._kept[character] = all(self._has(c) for piece, _ in split for c in piece)
        return kept

    def _has(self, character: str) -> bool:
        if character in self._ids:
            return True
        spelled = [f"<0x{byte:02X}>" for byte in character.encode()]
        return self._falls_back and all(token in self._ids for token in spelled)

"""Hugging Face's tokenizer.json as a tokenizer."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmfree_jax.data.pieces import byte_level_bytes, piece_bytes
from mmfree_jax.data.special_tokens import BY_NAME, as_text, resolve_ends, spell
from mmfree_jax.data.text_segments import segments, utf8
from mmfree_jax.errors import DataError
from mmfree_jax.files import write_bytes, write_text
from mmfree_jax.text_files import decode_text, parse_json

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
        """Ids of a text."""
        utf8(text)
        # The fast variant leaves out offsets, which nobody reads here.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return as_text(ids, self._spelled)

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

"""SentencePiece models as tokenizers."""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmfree_jax.data.pieces import piece_bytes
from mmfree_jax.data.text_segments import segments, utf8
from mmfree_jax.errors import DataError
from mmfree_jax.files import write_bytes, write_text

_SEGMENT = 2**12
"""Characters after which a long text is cut."""


class SentencePieceTokenizer:
    """A SentencePiece `.model` file, such as Mistral's (unk 0, bos 1, eos 2)."""

    kind = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        source: str = "the SentencePiece model",
        *,
        use_bos: bool = True,
        use_eos: bool = True,
    ) -> None:
        """Loads a model.

        Args:
          model: the contents of a `.model` file.
          source: names it in errors.
          use_bos: whether its start token is used.
          use_eos: whether its end token is used.
        """
        import sentencepiece

        self._model = model
        try:
            if not model:
                raise ValueError("it is empty")  # which the library takes, and fails later
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)  # type: ignore[call-arg]
        except (RuntimeError, ValueError) as e:
            raise DataError(f"{source} is not a SentencePiece model: give another file") from e
        self.vocab_size = int(self._processor.vocab_size())
        self._unused = {} if use_bos else {"bos_token": None}
        self._unused |= {} if use_eos else {"eos_token": None}
        self.bos_id = _id_or_none(self._processor.bos_id()) if use_bos else None
        self.eos_id = _id_or_none(self._processor.eos_id()) if use_eos else None
        self.unk_id = _id_or_none(self._processor.unk_id())
        digest = hashlib.sha256(model)
        if self._unused:
            digest.update(f" bos {self.bos_id} eos {self.eos_id}".encode())
        self.sha256 = digest.hexdigest()
        self._skip = self._ids_before_newline()
        processor = self._processor
        self.special_tokens: Mapping[str, int] = {
            processor.IdToPiece(i): i for i in range(self.vocab_size) if processor.IsControl(i)
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        # Start and end are control pieces, which the encoder never makes from text.
        utf8(text)
        return self._processor.EncodeAsIds(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, int32."""
        if self._skip is None:
            return np.array(self.encode(text), np.int32)
        parts = [self.encode(segment) for segment in segments(text, _SEGMENT)]
        later = (part[self._skip :] for part in parts[1:])
        return np.array([*parts[0], *itertools.chain.from_iterable(later)], np.int32)

    def count_lost(self, text: str) -> int:
        """None: these models always have an unknown token."""
        return 0

    def piece(self, token: int) -> str:
        """The piece of an id, as the model's file names it."""
        return self._processor.IdToPiece(token)

    def token_bytes(self, token: int) -> bytes:
        """What one id stands for."""
        return piece_bytes(self.piece(token)) if 0 <= token < self.vocab_size else b""

    def _ids_before_newline(self) -> int | None:
        """Ids to drop from a segment that begins with a newline; None if cuts change the ids.

        Encoding slows down with the length of the text: cutting it every few thousand
        characters doubles the rate. Before a newline a cut is exact if no piece spans one:
        the later segment then only gains the space that SentencePiece puts before a text.
        """
        processor = self._processor
        pieces = (processor.IdToPiece(i) for i in range(self.vocab_size))
        newline = self.encode("\n")
        if not newline or len(newline) > 2 or any("\n" in piece for piece in pieces):
            return None
        skip = len(newline) - 1
        for left, right in (
            ("a", "\nb"),
            ("a  ", "\n  b \n\n"),
            (" \r", "\n\tz"),
            ("é", "\n\u0301"),
        ):
            if self.encode(left + right) != self.encode(left) + self.encode(right)[skip:]:
                return None
        return skip

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids beyond the vocabulary read as unknown."""
        unknown = 0 if self.unk_id is None else self.unk_id
        return self._processor.DecodeIds(
            [i if 0 <= i < self.vocab_size else unknown for i in map(int, ids)]
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.model`, and which of its ends are not used, if any."""
        if self._unused:
            write_text(Path(folder) / "tokenizer_config.json", json.dumps(self._unused) + "\n")
        write_bytes(Path(folder) / "tokenizer.model", self._model)


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None

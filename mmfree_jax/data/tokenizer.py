"""Tokenizers: bytes, byte-level BPE trained here, SentencePiece and Hugging Face files.

`load_tokenizer` gives any of them the same shape. Text never turns into a special token:
"</s>" in a document is four characters, and only `bos_id` and `eos_id` mark its ends.
There is no padding token: batches mark padding by segment 0. Nothing here imports JAX.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from mmfree_jax.data.pieces import byte_level_bytes, piece_bytes
from mmfree_jax.data.special_tokens import (
    BOS_TOKEN,
    BY_NAME,
    CONFIGS,
    EOS_TOKEN,
    as_text,
    named_ends,
    resolve_ends,
    spell,
)
from mmfree_jax.errors import DataError
from mmfree_jax.fetched import local_copy
from mmfree_jax.files import write_bytes, write_text
from mmfree_jax.storage import Url, list_names
from mmfree_jax.text_files import decode_text, parse_json, read_bytes

BYTE = "byte"
BYTE_BOS, BYTE_EOS = 256, 257
TOKENIZER_FOLDER = "tokenizer"
_SEGMENT, _JSON_SEGMENT = 2**12, 2**16
"""Characters after which a long text is cut, for SentencePiece and for tokenizer.json."""


class Tokenizer(Protocol):
    """What every tokenizer offers.

    Attributes:
      kind: "byte", "sentencepiece", or the model in a tokenizer.json ("bpe", "unigram", ...).
      vocab_size: one more than the largest id.
      bos_id: start of a document, or None.
      eos_id: end of a document, or None.
      unk_id: what stands for text that cannot be encoded, or None if there is none.
      sha256: identifies the mapping between text and ids (hex).
      special_tokens: ids of the special tokens by their names, which chat templates write.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    sha256: str
    special_tokens: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start or end token."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an integer array; faster, and lighter on memory, for long texts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids: special tokens are left out, bytes that are no UTF-8 are U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one id stands for, with its leading space; of a special token its name."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes files into `folder`, from which `load_tokenizer` makes the same tokenizer."""
        ...


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What data sets and checkpoints remember of their tokenizer."""
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, start of document 256, end of document 257."""

    kind = BYTE
    vocab_size = 258
    bos_id: int | None = BYTE_BOS
    eos_id: int | None = BYTE_EOS
    unk_id: int | None = None
    sha256 = hashlib.sha256(b"mmfree byte tokenizer: 0-255 bytes, 256 bos, 257 eos").hexdigest()
    special_tokens: Mapping[str, int] = MappingProxyType({BOS_TOKEN: BYTE_BOS, EOS_TOKEN: BYTE_EOS})

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(_utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, uint8."""
        return np.frombuffer(_utf8(text), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids, whatever they are; special tokens and larger ids are left out."""
        return bytes(i for i in map(int, ids) if i < 256)

    def token_bytes(self, token: int) -> bytes:
        """What one id stands for."""
        names = (BOS_TOKEN.encode(), EOS_TOKEN.encode())
        return bytes([token]) if token < BYTE_BOS else b"".join(names[token - BYTE_BOS :][:1])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `byte.json`."""
        write_bytes(Path(folder) / "byte.json", json.dumps(identity(self)).encode() + b"\n")


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
        _utf8(text)
        return self._processor.EncodeAsIds(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, int32."""
        if self._skip is None:
            return np.array(self.encode(text), np.int32)
        parts = [self.encode(segment) for segment in _segments(text, _SEGMENT)]
        later = (part[self._skip :] for part in parts[1:])
        return np.array([*parts[0], *itertools.chain.from_iterable(later)], np.int32)

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
        _utf8(text)
        # The fast variant leaves out offsets, which nobody reads here.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return as_text(ids, self._spelled)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, int32."""
        if not self._can_cut:
            return np.array(self.encode(text), np.int32)
        # `tokenizers` keeps some 150 bytes a token until a text is done.
        parts = [np.array(self.encode(s), np.int32) for s in _segments(text, _JSON_SEGMENT)]
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


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: "byte"; a SentencePiece `.model` or Hugging Face `tokenizer.json` file; or a folder
        that holds one (a prepared data set, a run directory, a Hugging Face model). The file or
        the folder may be the URL of a bucket.

    Raises:
      DataError: there is no such file, or it is not a tokenizer.
      StorageError: the bucket cannot be read, or holds none there.
    """
    if str(path) == BYTE:
        return ByteTokenizer()
    file = _find_file(tokenizer_copy(path))
    if file.name == "byte.json":
        return ByteTokenizer()
    try:
        contents = read_bytes(file)
    except OSError as e:
        raise DataError(f"tokenizer {file}: {e.strerror}; give a readable file") from e
    bos, eos = named_ends(file.parent)
    source = f"tokenizer {file}"
    if file.suffix == ".json":
        return JsonTokenizer(contents, bos, eos, source)
    tokenizer = SentencePieceTokenizer(
        contents, source, use_bos=bos is not None, use_eos=eos is not None
    )
    for key, name, i in (
        ("bos_token", bos, tokenizer.bos_id),
        ("eos_token", eos, tokenizer.eos_id),
    ):
        own = None if i is None else tokenizer.piece(i)
        if name not in (None, BY_NAME, own):
            raise DataError(
                f"{file.parent}: {key} is {name!r}, that of {file.name} is {own!r}: give the "
                "tokenizer.json of the same tokenizer, or make them one"
            )
    return tokenizer


def tokenizer_copy(path: str | os.PathLike[str]) -> Path:
    """The file or folder of a tokenizer: itself, or a copy of what its URL names.

    Raises:
      StorageError: the bucket cannot be read, or holds none there.
    """
    return local_copy(path, "tokenizer", _is_tokenizer, _is_beside)


def tokenizer_folder(data: Path | Url) -> Path | None:
    """The folder of the tokenizer that a prepared data set holds; None: it holds none.

    Raises:
      StorageError: the bucket cannot be read.
    """
    folder = data / TOKENIZER_FOLDER
    if isinstance(folder, Path):
        return folder if folder.is_dir() else None
    return local_copy(str(folder), "tokenizer") if list_names(folder) else None


def _is_tokenizer(name: PurePosixPath) -> bool:
    """Whether an object of a folder may belong to its tokenizer."""
    where = name.parts[:-1]
    kinds = (".jinja", ".json", ".model")
    is_known = name.suffix in kinds and not name.name.startswith(".")
    return where in ((), (TOKENIZER_FOLDER,)) and is_known


def _is_beside(name: PurePosixPath) -> bool:
    """Whether an object beside a tokenizer's file says which its ends are, or how it chats."""
    return str(name) in CONFIGS or name.suffix == ".jinja"


def _find_file(path: Path) -> Path:
    """The file that defines the tokenizer at `path`."""
    if path.is_file():
        # SentencePiece files go by many names: Mistral's is tokenizer.model.v1.
        return path
    if not path.is_dir():
        raise DataError(
            f"tokenizer {path} does not exist: give 'byte', a SentencePiece .model file, a "
            "tokenizer.json, or a folder that holds one"
        )
    for folder in (path, path / TOKENIZER_FOLDER):
        for name in ("byte.json", "tokenizer.json", "tokenizer.model"):
            if (folder / name).is_file():
                return folder / name
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    raise DataError(
        f"tokenizer folder {path} holds no tokenizer.json or tokenizer.model: name the file itself"
    )


def _utf8(text: str) -> bytes:
    """A text's bytes.

    Raises:
      DataError: it holds half of a surrogate pair, which no UTF-8 stands for.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise DataError(
            f"a text has half of a surrogate pair, or a byte that is not UTF-8, at character "
            f"{e.start}: repair it"
        ) from e


def _segments(text: str, size: int) -> list[str]:
    """`text` cut every `size` characters or more, before a newline that follows no white space."""
    segments, start, search = [], 0, size
    while (stop := text.find("\n", search)) >= 0:
        if not text[stop - 1].isspace():
            segments.append(text[start:stop])
            start, search = stop, stop + size
        else:
            search = stop + 1
    return [*segments, text[start:]]


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None

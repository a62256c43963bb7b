"""What every tokenizer offers, bytes as one, and how the others are found and loaded.

`load_tokenizer` gives any of them the same shape. Text never turns into a special token:
"</s>" in a document is four characters, and only `bos_id` and `eos_id` mark its ends.
There is no padding token: batches mark padding by segment 0. Nothing here imports JAX.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from mmfree_jax.data.json_tokenizer import JsonTokenizer
from mmfree_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from mmfree_jax.data.special_tokens import (
    BOS_TOKEN,
    BY_NAME,
    CONFIGS,
    EOS_TOKEN,
    named_ends,
)
from mmfree_jax.data.text_segments import utf8
from mmfree_jax.errors import DataError
from mmfree_jax.fetched import local_copy
from mmfree_jax.files import write_bytes
from mmfree_jax.storage import Url, list_names
from mmfree_jax.text_files import read_bytes

BYTE = "byte"
BYTE_BOS, BYTE_EOS = 256, 257
TOKENIZER_FOLDER = "tokenizer"


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

    def count_lost(self, text: str) -> int:
        """Characters of a text that no id stands for, not even `unk_id`."""
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
    """UTF-8 bytes as ids 0 to 255, start of document 256, end of document 257.

    Example:
      >>> from mmfree_jax.data import ByteTokenizer
      >>> ByteTokenizer().encode("MLGRU")
      [77, 76, 71, 82, 85]
      >>> ByteTokenizer().decode([77, 76])
      'ML'
    """

    kind = BYTE
    vocab_size = 258
    bos_id: int | None = BYTE_BOS
    eos_id: int | None = BYTE_EOS
    unk_id: int | None = None
    sha256 = hashlib.sha256(b"mmfree byte tokenizer: 0-255 bytes, 256 bos, 257 eos").hexdigest()
    special_tokens: Mapping[str, int] = MappingProxyType({BOS_TOKEN: BYTE_BOS, EOS_TOKEN: BYTE_EOS})

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, uint8."""
        return np.frombuffer(utf8(text), np.uint8)

    def count_lost(self, text: str) -> int:
        """None: each byte has an id."""
        return 0

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

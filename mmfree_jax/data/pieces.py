"""Bytes of a vocabulary's pieces, as tokenizers' files spell them. Nothing here imports JAX."""

import functools
import re
from collections.abc import Mapping

_SPACE = "\u2581"  # SentencePiece's sign for a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: "<0xE2>" is one byte, and its sign for a space a space."""
    if byte := _BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace(_SPACE, " ").encode()


def byte_level_bytes(piece: str) -> bytes:
    """Bytes of a piece in GPT-2's byte-level alphabet; of one in another its UTF-8."""
    table = byte_level_alphabet()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.encode()


@functools.cache
def byte_level_alphabet() -> Mapping[str, int]:
    """The byte that each character of GPT-2's byte-level alphabet stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }

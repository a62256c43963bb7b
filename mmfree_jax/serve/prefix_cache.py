"""States after the beginnings of prompts, by a digest of their tokens; the oldest go first."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

import jax
import numpy as np

from mmfree_jax.model import Session


def session_bytes(session: Session) -> int:
    """Memory of a session's arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(session))


class PrefixCache:
    """Sessions of one row on the device, each behind some tokens; of one model. Not thread-safe.

    Attributes:
      bytes: held.
      hits: prompts for a beginning of which a state was found.
      misses: prompts for which none was.
      tokens_saved: of prompts, that need not be read.
    """

    def __init__(self, most_bytes: int) -> None:
        """An empty cache of at most so many bytes; 0: one that keeps nothing."""
        self._most = most_bytes
        self._entries: OrderedDict[bytes, tuple[int, Session, int]] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self.bytes = self.hits = self.misses = self.tokens_saved = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> tuple[int, Session | None]:
        """The longest beginning of a prompt whose state is held: its length, and the state."""
        if not self._most:
            return 0, None
        lengths = sorted(n for n in self._lengths if n <= len(tokens))
        keys = _keys(tokens, lengths)
        for length, key in zip(reversed(lengths), reversed(keys), strict=True):
            if key in self._entries:
                self._entries.move_to_end(key)
                self.hits += 1
                self.tokens_saved += length
                return length, self._entries[key][1]
        self.misses += 1
        return 0, None

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether the state after just these tokens is held, or cannot be."""
        return not self._most or _keys(tokens, [len(tokens)])[0] in self._entries

    def add(self, tokens: Sequence[int], session: Session) -> None:
        """Holds the state after tokens, if it has room; others make room."""
        size = session_bytes(session)
        if size > self._most:
            return
        key = _keys(tokens, [len(tokens)])[0]
        self._drop(key)
        while self.bytes + size > self._most:
            self._drop(next(iter(self._entries)))
        self._entries[key] = len(tokens), session, size
        self._lengths[len(tokens)] += 1
        self.bytes += size

    def clear(self) -> None:
        """Forgets every state; the counts stay."""
        for key in list(self._entries):
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        if key not in self._entries:
            return
        length, _, size = self._entries.pop(key)
        self.bytes -= size
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Digests of the beginnings of so many tokens, in one pass; lengths ascend."""
    data = np.asarray(tokens, "<i4").tobytes()
    digest, start, keys = hashlib.blake2b(digest_size=16), 0, []
    for length in lengths:
        digest.update(data[4 * start : 4 * length])
        keys.append(digest.copy().digest())
        start = length
    return keys

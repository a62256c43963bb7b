"""Multi-query associative recall (MQAR): rows that are made as they are read.

The task of Zoology (arXiv 2312.04927). A row begins with pairs of a key and a value, no key and
no value twice; behind them each key comes once more, and the model is to say its value there.
Between two keys asked for lie tokens at random. How far behind the pairs a key is asked for falls
off by a power law, as repeated pairs of words do in text. Only answers are targets.

```
tokens    k1 v1 k2 v2  .  k2  .  .  .  .  k1  .
targets    -  -  -  -  -  v2  -  -  -  -  v1  -
```

A row is a function of the task, the split and its number: integers of Philox, no file, nothing
that another version of numpy would draw otherwise. Nothing here imports JAX.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from mmfree_jax.data.dataset import HELDOUT, TRAIN, Row
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.ranges import Count, NotNegative, TwoOrMore, check_numbers, require

PREFIX = "mqar:"
_ROWS = {TRAIN: 2**26, HELDOUT: 2**12}
"""In each split; of the first no run reads all."""


@dataclass(frozen=True)
class Mqar:
    """What a row asks; in `data.paths` "mqar:pairs=8,vocab=8192,power=0.01"."""

    pairs: Count
    """Pairs in a row, and answers asked for."""
    vocab: TwoOrMore = 8192
    """Tokens: keys are of the lower half, values of the upper."""
    power: NotNegative = 0.01
    """Gap g (pairs of tokens) has weight (1 + g)^(power - 1): 1 is uniform."""

    def __post_init__(self) -> None:
        check_numbers(self, PREFIX)
        most = self.vocab // 2 - 1
        require(
            self.pairs <= most, f"{PREFIX}pairs", self.pairs,
            f"the vocab of {self.vocab} has {most} keys: set fewer pairs, or a vocab of "
            f"{2 * self.pairs + 2} or more",
        )  # fmt: skip

    def __str__(self) -> str:
        """As `parse_mqar` reads it."""
        return f"{PREFIX}pairs={self.pairs},vocab={self.vocab},power={self.power:g}"

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row that it fits in."""
        return 4 * self.pairs


def is_mqar(path: object) -> bool:
    """Whether a path of `data.paths` names this task rather than a folder."""
    return isinstance(path, str) and path.startswith(PREFIX)


def parse_mqar(text: str) -> Mqar:
    """The task that a text names.

    Args:
      text: "mqar:pairs=8", with vocab= and power= behind it, separated by commas, or without.

    Raises:
      ConfigError: a part is unknown, malformed, given twice or not in its range.
    """
    values: dict[str, float] = {}
    kinds = {"pairs": int, "vocab": int, "power": float}
    for part in text.removeprefix(PREFIX).split(","):
        name, _, value = part.partition("=")
        try:
            if name in values:
                raise ValueError
            values[name] = kinds[name](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"data {text!r} has {part!r}: give pairs=N, and vocab=N or power=X where they are "
                "others than 8192 and 0.01, each once, separated by commas"
            ) from None
    if "pairs" not in values:
        raise ConfigError(f"data {text!r} has no pairs: give {PREFIX}pairs=N")
    return Mqar(**values)  # type: ignore[arg-type]


def mqar_row(task: Mqar, split: str, number: int, seq_len: int) -> Row:
    """One row of the task.

    Args:
      task: what it asks.
      split: "train" or "heldout", which have no row in common.
      number: of the row, from 0.
      seq_len: T, at least `task.shortest`.

    Returns:
      tokens, targets (-1 but where a key is asked for) and segment_ids (1), int32 [T].
    """
    n, keys = task.pairs, task.vocab // 2 - 1
    values, gaps = task.vocab - task.vocab // 2, (seq_len - 2 * task.pairs) // 2
    stream = hashlib.sha256(f"mqar 1 {n} {task.vocab} {split}".encode()).digest()
    key = np.array([int.from_bytes(stream[:8], "little"), number], np.uint64)
    raw = np.random.Philox(key=key).random_raw(keys + values + gaps + seq_len)
    shares = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53  # within (0, 1)
    of_keys, of_values, of_gaps, fill = np.split(shares, np.cumsum([keys, values, gaps]))
    key_n, value_n = 1 + _smallest(of_keys, n), task.vocab // 2 + _smallest(of_values, n)
    # The first of exponential clocks, each with the rate of its gap: drawn without replacement.
    place_n = 2 * n + 2 * _smallest(
        -np.log(of_gaps) * np.arange(1, gaps + 1) ** (1 - task.power), n
    )
    tokens = (fill * task.vocab).astype(np.int32)
    tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], tokens[place_n] = key_n, value_n, key_n
    targets = np.full(seq_len, -1, np.int32)
    targets[place_n] = value_n
    return {"tokens": tokens, "targets": targets, "segment_ids": np.ones(seq_len, np.int32)}


def _smallest(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the smallest numbers, the least first."""
    found = np.argpartition(x, count - 1)[:count]
    return found[np.argsort(x[found])]


class MqarRows:
    """One split of the task, as `TokenDataset` is one of a prepared folder.

    Attributes:
      path: the task as text.
      split: "train" or "heldout".
      num_tokens: in rows of the shortest length.
      vocab_size: number of ids.
      identity: stands where a tokenizer's does: tasks of one vocabulary mix.
      fingerprint: SHA-256 that stands for the rows (hex).
      bytes_per_token: 0: there is no text.
    """

    def __init__(self, task: Mqar, split: str) -> None:
        self.task, self.path, self.split = task, str(task), split
        self.num_tokens = _ROWS[split] * task.shortest
        self.vocab_size = task.vocab
        vocabulary = hashlib.sha256(f"mqar {task.vocab}".encode()).hexdigest()
        self.identity = {
            "kind": "mqar", "vocab_size": task.vocab, "sha256": vocabulary,
            "bos_id": None, "eos_id": None,
        }  # fmt: skip
        self.fingerprint = hashlib.sha256(f"mqar 1 {task} {split}".encode()).hexdigest()
        self.bytes_per_token = 0.0

    def num_rows(self, seq_len: int, *, partial: bool = False) -> int:
        """Rows of `seq_len` tokens; none is shorter.

        Raises:
          DataError: the task does not fit into so short a row.
        """
        del partial
        if seq_len < self.task.shortest:
            raise DataError(
                f"data {self.path} takes 4 tokens a pair, data.seq_len is {seq_len}: set "
                f"--data.seq-len {self.task.shortest} or more, or fewer pairs"
            )
        return _ROWS[self.split]

    def row(self, r: int, seq_len: int) -> Row:
        """Row `r` as a batch row: tokens, targets, segment_ids, int32 [seq_len]."""
        if not 0 <= r < self.num_rows(seq_len):
            raise IndexError(f"row {r} of {self.num_rows(seq_len)}")
        return mqar_row(self.task, self.split, r, seq_len)

    def predicted_in_row(self, r: int, seq_len: int) -> int:
        """Number of targets in row `r`: an answer a pair."""
        del r, seq_len
        return self.task.pairs

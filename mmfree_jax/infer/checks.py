"""What `generate` is given, checked: prompts, options and seeds, of Python, numpy or JAX."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.infer.decode import Session
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.readable import brief


def _whole(value: Any) -> int | None:
    """A whole number, of Python, numpy or JAX; None: it is none."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_options(config: ModelConfig, max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
    """The stop ids as a list.

    Raises:
      ConfigError: one is no token of the model, or `max_new_tokens` is no whole number.
    """
    most = _whole(max_new_tokens)
    if most is None or most < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens!r}: set a whole number, 0 or more")
    if not isinstance(stop_ids, Iterable) or isinstance(stop_ids, (str, bytes)):
        raise ConfigError(f"stop_ids is {stop_ids!r}: give a list of token ids")
    found = []
    for token in stop_ids:
        if (number := _whole(token)) is None or not 0 <= number < config.vocab_size:
            raise ConfigError(
                f"stop_ids holds {token!r}: the model's ids go from 0 to {config.vocab_size - 1}"
            )
        found.append(number)
    return found


def check_streams(
    batch: int, seed: int | Sequence[int], streams: Sequence[tuple[int, int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Seeds, uint32 [B], and the two numbers behind them, uint32 [B, 2], of each row.

    Raises:
      ConfigError: they are too few or too many, or no whole numbers of 32 bits.
    """
    one_for_all = _whole(seed)
    if streams is None:
        streams = [(row if one_for_all is not None else 0, 0) for row in range(batch)]
    if len(streams) != batch:
        raise ConfigError(f"streams has {len(streams)} entries: give {batch}, one a prompt")
    given: Any = seed if one_for_all is None else [one_for_all] * batch
    if not isinstance(given, Iterable) or isinstance(given, str) or getattr(given, "ndim", 1) != 1:
        raise ConfigError(f"seed is {seed!r}: set a whole number from 0 to 2^32 - 1")
    seeds = list(given)
    if len(seeds) != batch:
        raise ConfigError(
            f"seed has {len(seeds)} entries: give one number, or {batch}, one a prompt"
        )
    for name, values in (("seed", seeds), *(("streams", pair) for pair in streams)):
        for value in values:
            if (number := _whole(value)) is None or not 0 <= number < 2**32:
                verb = "is" if one_for_all is not None and name == "seed" else "has"
                raise ConfigError(f"{name} {verb} {value!r}: set whole numbers from 0 to 2^32 - 1")
    if any(len(pair) != 2 for pair in streams):
        raise ConfigError("streams has entries that are no pairs: give (place, sample) of each")
    return np.array(seeds, np.uint32), np.array(streams, np.uint32).reshape(batch, 2)


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], session: Session | None
) -> list[list[int]]:
    """The prompts as lists; refuses what the model cannot read, or does not fit the session.

    Args:
      config: of the model.
      prompts: sequences of whole numbers, or arrays of them.
      session: that they are appended to.

    Raises:
      DataError: there is none, one is empty, no list of whole numbers, or has an id that the model
        does not have.
      ConfigError: the session is of another size.
    """
    prompts = [_ids(row, prompt) for row, prompt in enumerate(rows_of(prompts))]
    if not prompts:
        raise DataError("prompts is empty: give at least one prompt")
    if session is not None and session.logits_BV.shape != (len(prompts), config.vocab_size):
        rows, vocabulary = session.logits_BV.shape
        raise ConfigError(
            f"session has {rows} rows and a vocabulary of {vocabulary}, but there are "
            f"{len(prompts)} prompts and {config.vocab_size} tokens: use a session of this model, "
            "with one row a prompt (see fork and select_rows)"
        )
    read = np.zeros(len(prompts)) if session is None else np.asarray(session.state.position_B)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0 and read[row] == 0:
            raise DataError(
                f"prompt {row} is empty: give at least one token, for example the tokenizer's "
                "start-of-text token"
            )
        for place, token in enumerate(prompt):
            if not 0 <= token < config.vocab_size:
                raise DataError(
                    f"prompt {row} has token id {token} at position {place}: the model's ids go "
                    f"from 0 to {config.vocab_size - 1}"
                )
    return prompts


def rows_of(prompts: Any) -> list[Any]:
    """The prompts of a request, of which a text or a number alone is none.

    Raises:
      DataError: it is no list.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise DataError(f"prompts is {brief(prompts)}: give a list of prompts")
    return list(prompts)


def _ids(row: int, prompt: Any) -> list[int]:
    is_list = isinstance(prompt, Iterable) and getattr(prompt, "ndim", 1) == 1
    if isinstance(prompt, (str, bytes)) or not is_list:
        raise DataError(
            f"prompt {row} is {brief(prompt)}: give a list of token ids for each prompt (texts: "
            "generate_text)"
        )
    tokens = np.asarray(prompt).tolist() if hasattr(prompt, "dtype") else list(prompt)
    for place, token in enumerate(tokens):
        if isinstance(token, bool) or _whole(token) is None:
            raise DataError(
                f"prompt {row} has {brief(token)} at position {place}: give whole numbers"
            )
    return list(map(operator.index, tokens))

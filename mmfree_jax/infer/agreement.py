"""Whether two forms of a model write the same greedy text.

Greedy streams are a hard test: one token that differs changes all that follow, so that what is
counted is the tokens before the first that does.
"""

import os
from collections.abc import Sequence

import numpy as np

from mmfree_jax.data.dataset import HELDOUT, open_dataset
from mmfree_jax.errors import DataError
from mmfree_jax.infer.api import generate
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import Weights
from mmfree_jax.saved.open_model import SavedModel
from mmfree_jax.saved.packed import StreamAgreement

Streams = list[list[int]]

PROMPT_TOKENS = 32


def measure_agreement(
    trained: SavedModel,
    packed: SavedModel,
    *,
    prompts: int,
    new_tokens: int,
    documents: Streams | None = None,
) -> StreamAgreement:
    """Compares what a packed model and the trained one write, each as decoding here reads it.

    One after the other is read, so that only one is in memory.

    Args:
      trained: the model.
      packed: the model packed.
      prompts: how many continuations are compared.
      new_tokens: of each.
      documents: the prompts; None: short texts that the trained model samples itself.

    Raises:
      CheckpointError: a file is damaged, or the model's logits are not finite.
      DataError: the documents have tokens that the model has not.
    """
    weights = trained.weights()
    what = "held-out text"
    if documents is None:
        tokenizer = trained.tokenizer()
        start = None if tokenizer is None else tokenizer.bos_id
        documents = sampled_prompts(
            trained.model(), weights, count=prompts, length=PROMPT_TOKENS, start=[start or 0]
        )
        what = "sampled from the model"
    wanted = greedy_streams(trained.model(), weights, documents, new_tokens=new_tokens)
    del weights
    found = greedy_streams(packed.model(), packed.weights(), documents, new_tokens=new_tokens)
    return compare_streams(found, wanted, what)


def held_out_documents(
    data: str | os.PathLike[str], *, count: int, length: int, flag: str
) -> np.ndarray:
    """The first tokens of held-out documents, evenly chosen: [count, length] int32.

    Args:
      data: prepared data set.
      count: documents.
      length: tokens of each.
      flag: that sets `count`, for the message.

    Raises:
      DataError: it is no data set, or too few documents are long enough.
    """
    dataset = open_dataset(data, HELDOUT)
    long = [i for i in range(dataset.num_documents) if len(dataset.document(i)) >= length]
    if len(long) < count:
        raise DataError(
            f"{data} has {len(long)} held-out documents of {length} tokens: set {flag} "
            f"{len(long) or '0'}, or name other data"
        )
    chosen = np.linspace(0, len(long) - 1, count).round().astype(int)
    return np.stack([dataset.document(long[i])[:length] for i in chosen])


def greedy_streams(
    model: LanguageModel,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int = 64,
) -> Streams:
    """The likeliest tokens one after another behind each prompt, past any end of text."""
    streams: Streams = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        out = generate(model, weights, batch, max_new_tokens=new_tokens, temperature=0)
        streams += out.tokens
    return streams


def sampled_prompts(
    model: LanguageModel, weights: Weights, *, count: int, length: int, start: Sequence[int]
) -> Streams:
    """Prompts in the model's own words, for a model whose data are not at hand.

    Args:
      model: the model.
      weights: of it.
      count: prompts.
      length: tokens sampled for each, the same at every call.
      start: tokens that each begins with, at least one.
    """
    out = generate(model, weights, [list(start)] * count, max_new_tokens=length)
    return [[*start, *tokens] for tokens in out.tokens]


def compare_streams(found: Streams, wanted: Streams, prompts: str) -> StreamAgreement:
    """Counts the tokens that continuations have in common.

    Args:
      found: continuations, one a prompt.
      wanted: those of the other model, of equal lengths.
      prompts: what they were, in words.
    """
    agreed = []
    for ours, theirs in zip(found, wanted, strict=True):
        same = [a == b for a, b in zip(ours, theirs, strict=True)]
        agreed.append([*same, False].index(False))
    return StreamAgreement(len(wanted[0]), tuple(agreed), prompts)

"""Whether two forms of a model write the same greedy text.

Greedy streams are a hard test: one token that differs changes all that follow, so that what is
counted is the tokens before the first that does.
"""

from collections.abc import Sequence

from mmfree_jax.infer.api import generate
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import Weights
from mmfree_jax.saved.packed import StreamAgreement

Streams = list[list[int]]


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

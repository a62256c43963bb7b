"""A context and its answer as token ids, also where one token spans the place where they meet."""

import itertools

from mmfree_jax.infer.text import Tokenizer
from mmfree_jax.model_config import ModelConfig


def encode_pair(tokenizer: Tokenizer, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of the answer behind it, without start tokens.

    As in lm-eval, white space at the end of the context goes to the answer, and both are encoded
    as one text, which is cut where the context's own ids end. That needs the text's ids to
    begin with the context's. Where a token spans the join they do not: the answer is encoded by
    itself then, or, where no ids of its own continue the context's text (a tokenizer that puts a
    space before every text), the ids from the spanning token on are scored.

    Args:
      tokenizer: of the model.
      context: may be empty.
      answer: may be empty.

    Returns:
      The context's ids and the answer's; either may be empty.

    Example:
      >>> from mmfree_jax.data import ByteTokenizer
      >>> from mmfree_jax.evaluate import encode_pair
      >>> encode_pair(ByteTokenizer(), "1 + ", "2")  # the blank goes to the answer
      ([49, 32, 43], [32, 50])
    """
    kept = context.rstrip()
    context, answer = kept, context[len(kept) :] + answer
    if not context:
        return [], list(tokenizer.encode(answer)) if answer else []
    start, whole = list(tokenizer.encode(context)), list(tokenizer.encode(context + answer))
    if not answer or whole[: len(start)] == start:
        return start, whole[len(start) :] if answer else []
    newline = list(tokenizer.encode("\n"))
    behind = list(tokenizer.encode("\n" + answer))
    candidates = [list(tokenizer.encode(answer))]
    if behind[: len(newline)] == newline:
        candidates.append(behind[len(newline) :])
    text = tokenizer.decode(whole)
    for ids in candidates:
        if ids and tokenizer.decode(start + ids) == text:
            return start, ids
    shared = len(list(itertools.takewhile(lambda p: p[0] == p[1], zip(start, whole, strict=False))))
    return whole[:shared], whole[shared:]


def default_length(config: ModelConfig, trained: int | None) -> int:
    """Longest sequence that a model trained on rows of `trained` tokens can be asked to read."""
    if trained is None or config.recurrent:
        return max(trained or 0, 2048)
    return trained

"""Training a tokenizer: byte-level BPE."""

from collections.abc import Iterable

from mmfree_jax.data.json_tokenizer import JsonTokenizer
from mmfree_jax.data.special_tokens import BOS_TOKEN, EOS_TOKEN
from mmfree_jax.errors import DataError

_MOST_TOKENS = 2**24


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Trains a byte-level BPE: any text can be encoded, and decodes to itself.

    Args:
      texts: documents; read once, without being kept.
      vocab_size: tokens, with the 256 bytes and the two special tokens.

    Raises:
      DataError: vocab_size is too small, too large, or larger than the text allows.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise DataError(
            f"vocab_size is {vocab_size}: set --vocab-size 258 or more (256 bytes, start and end)"
        )
    if vocab_size > _MOST_TOKENS:  # the trainer makes room for all of them, or aborts
        raise DataError(f"vocab_size is {vocab_size}: set --vocab-size {_MOST_TOKENS} or less")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # type: ignore[call-arg]
        special_tokens=[BOS_TOKEN, EOS_TOKEN],  # type: ignore[call-arg]
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = JsonTokenizer(tokenizer.to_str(pretty=True).encode(), BOS_TOKEN, EOS_TOKEN)
    if trained.vocab_size < vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size}, the text supports only {trained.vocab_size} tokens: "
            f"set --vocab-size {trained.vocab_size} or less, or give more text"
        )
    return trained

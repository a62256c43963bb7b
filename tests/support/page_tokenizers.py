"""Tokenizers of the kinds that an export's web page reads, and texts that are hard for them."""

import functools
import io
import itertools

import sentencepiece

from mmfree_jax.data import tokenizer as tokenizer_lib
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.export import web_tokenizer

TEXTS = [
    "We hold these truths to be self-evident, that all are created equal. " * 3,
    "My fellow citizens, the state of our union is strong;\n\tso is  our café 日本.\n\n",
]
HARD = [
    *web_tokenizer.CHECKS,
    "",
    " ",
    "\x00\x7f",
    *(a + b + c for a, b, c in itertools.product(("e", " ", "\n", "🙂"), ("", "  ", "é"), "a. 日")),
    *(character * n for character in " =ao\n▁" for n in (2, 3, 5, 7, 11, 16, 33)),
]


def sentencepiece_model(**options) -> tokenizer_lib.SentencePieceTokenizer:
    """A model of the kind of Mistral's: BPE, bytes for what it does not know, text as it is."""
    kind = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 330,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **(kind | options)
    )
    return tokenizer_lib.SentencePieceTokenizer(model.getvalue())


@functools.cache
def make_tokenizers() -> dict[str, tokenizer_lib.Tokenizer]:
    return {
        "byte": tokenizer_lib.ByteTokenizer(),
        "bpe": train_bpe(TEXTS, 300),
        "sentencepiece": sentencepiece_model(),
        "no dummy prefix": sentencepiece_model(add_dummy_prefix=False),
    }

"""The tokenizer's file of an export's web page; tests in a browser are in test_web_chat.py."""

import json
from pathlib import Path

import pytest
import tokenizers
from page_tokenizers import HARD, make_tokenizers, sentencepiece_model

from mmfree_jax.data import tokenizer as tokenizer_lib
from mmfree_jax.errors import DataError
from mmfree_jax.export import web_page, web_tokenizer


def check_file(tokenizer, texts):
    spec = web_tokenizer.browser_tokenizer(tokenizer)
    encoder = tokenizers.Tokenizer.from_str(json.dumps(spec["encoder"]))
    for text in texts:
        ids = encoder.encode(text, add_special_tokens=False).ids if text else []
        assert ids == tokenizer.encode(text), text


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "no dummy prefix"])
def test_the_rewritten_tokenizer_gives_the_same_ids(name):
    check_file(make_tokenizers()[name], HARD)


def test_mistrals_tokenizer_is_rewritten_exactly(mistral_model):
    mistral = tokenizer_lib.load_tokenizer(mistral_model)
    check_file(mistral, HARD)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model_type": "unigram"}, "model type 1"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character map"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"user_defined_symbols": ["union"]}, "user-defined pieces"),
    ],
)
def test_tokenizers_that_the_page_cannot_match_are_refused(options, word):
    with pytest.raises(DataError, match=word):
        web_tokenizer.browser_tokenizer(sentencepiece_model(vocab_size=310, **options))


def test_a_tokenizer_json_of_another_kind_is_refused():
    other = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}))
    tokenizer = tokenizer_lib.JsonTokenizer(other.to_str().encode())
    with pytest.raises(DataError, match="WordPiece"):
        web_tokenizer.browser_tokenizer(tokenizer)


def test_every_file_of_the_page_is_copied():
    folder = Path(web_page.__file__).parent / "web"
    assert {path.name for path in folder.iterdir() if path.is_file()} == set(web_page.FILES)

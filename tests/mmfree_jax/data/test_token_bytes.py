"""What single tokens stand for: the bytes of a text's tokens add up to the text."""

import json

import pytest

from mmfree_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from mmfree_jax.data.train_bpe import train_bpe

TEXT = "naïve 日本 🙂  two spaces\n\tand </s>"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["naïve two spaces and more"] * 3, 270)


def test_bytes_of_a_texts_tokens_add_up_to_it(mistral_model, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(TEXT)
        assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()
    mistral = load_tokenizer(mistral_model)  # which puts a space before every text
    ids = mistral.encode(TEXT)
    assert b"".join(map(mistral.token_bytes, ids)) == b" " + TEXT.encode()
    assert mistral.token_bytes(3 + 0xE2) == b"\xe2"


def test_special_tokens_are_known_by_their_names(mistral_model, bpe):
    assert ByteTokenizer.special_tokens == {"<|bos|>": 256, "<|eos|>": 257}
    assert bpe.special_tokens == {"<|bos|>": 0, "<|eos|>": 1}
    mistral = load_tokenizer(mistral_model)
    assert mistral.special_tokens == {"<s>": 1, "</s>": 2}
    for tokenizer in (ByteTokenizer(), bpe, mistral):
        for name, token in tokenizer.special_tokens.items():
            assert tokenizer.token_bytes(token) == name.encode()


def test_ids_beyond_the_vocabulary_stand_for_nothing(mistral_model, bpe):
    for tokenizer in (ByteTokenizer(), bpe, load_tokenizer(mistral_model)):
        assert tokenizer.token_bytes(10**6) == b""


def test_a_metaspace_piece_is_read_as_sentencepiece_does():
    vocab = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "x": 3}
    description = {
        "version": "1.0", "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }  # fmt: skip
    tokenizer = JsonTokenizer(json.dumps(description).encode(), None, None)
    assert [tokenizer.token_bytes(i) for i in (1, 2, 3)] == [b" the", b"\xe2", b"x"]

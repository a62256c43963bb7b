"""Where a context ends and its answer begins, in token ids."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mmfree_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from mmfree_jax.evaluate.encoding import encode_pair


@pytest.fixture(scope="module")
def merging():
    """Letters, and the merges r+i, v+er and ri+ver."""
    pieces = ["<|bos|>", "<|eos|>", *"abeirvxĠĊ", "ri", "er", "ver", "river"]
    merges = [("r", "i"), ("e", "r"), ("v", "er"), ("ri", "ver")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return JsonTokenizer(tokenizer.to_str().encode()), vocab


def test_a_split_between_tokens_is_the_joint_encodings(merging):
    tokenizer, ids = merging
    got = encode_pair(tokenizer, "a ", "river")  # the space goes to the answer
    assert got == ([ids["a"]], [ids["Ġ"], ids["river"]])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("ver", ["ver"]),  # the join is one token, river: nothing would be left
        ("ver ax", ["ver", "Ġ", "a", "x"]),  # "ver" would be lost, "ax" scored behind "ri"
        ("e", ["e"]),
    ],
)
def test_an_answer_whose_first_token_spans_the_join_is_encoded_by_itself(merging, answer, expected):
    tokenizer, ids = merging
    assert encode_pair(tokenizer, "a ri", answer) == (
        [ids["a"], ids["Ġ"], ids["ri"]],
        [ids[piece] for piece in expected],
    )


def test_what_has_no_tokens():
    tokenizer = ByteTokenizer()
    assert encode_pair(tokenizer, "", "") == ([], [])
    assert encode_pair(tokenizer, "ab", "") == ([97, 98], [])
    assert encode_pair(tokenizer, " \n", "b") == ([], [32, 10, 98])


def test_no_space_is_put_between_by_sentencepiece(mistral_model):
    tokenizer = load_tokenizer(mistral_model)
    start, rest = encode_pair(tokenizer, "The riv", "ers flow")
    assert tokenizer.decode(start + rest) == "The rivers flow"
    assert tokenizer.decode(start) == "The riv"
    assert rest

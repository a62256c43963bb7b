"""Characters that a tokenizer's library drops without a word: counted, and told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmfree_jax.cli import data as data_cli
from mmfree_jax.data.json_tokenizer import JsonTokenizer
from mmfree_jax.data.tokenizer import load_tokenizer
from mmfree_jax.errors import DataError

LETTERS = "abc é"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make(tokens, before=None, after=None, normalizer=None, **options):
    """A BPE of single characters, as the project reads it."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **options))
    if before is not None:
        made.pre_tokenizer = before
    if after is not None:
        made.decoder = after
    if normalizer is not None:
        made.normalizer = normalizer
    return JsonTokenizer(made.to_str().encode(), None, None)


def of_bytes(tokens):
    return make(tokens, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


@settings(max_examples=200)
@given(st.text(LETTERS + "xyzÉ日\n", max_size=30))
def test_what_is_counted_is_what_decoding_lacks(text):
    """The library itself says what it drops: the decoded text is shorter by just that."""
    plain = make(LETTERS, after=decoders.Fuse())
    assert plain.count_lost(text) == len(text) - len(plain.decode(plain.encode(text)))
    lower = make(LETTERS, after=decoders.Fuse(), normalizer=normalizers.Lowercase())
    assert lower.count_lost(text) == len(text) - len(lower.decode(lower.encode(text)))
    whole = of_bytes(BYTES)
    assert whole.count_lost(text) == 0
    assert whole.decode(whole.encode(text)) == text


@pytest.mark.parametrize(
    ("tokenizer", "text", "lost"),
    [
        (of_bytes([b for b in BYTES if b not in "xÃ"]), "xab x é", 3),  # é is Ã ©
        (make([*LETTERS, "<unk>"], unk_token="<unk>"), "xyz", 0),
        (make([*LETTERS, *(f"<0x{i:02X}>" for i in range(128))], byte_fallback=True), "xy日", 1),
        (make([*"ab▁"], pre_tokenizers.Metaspace()), "a b c", 1),
        (make([*"ab"], pre_tokenizers.Metaspace()), "a b", 3),  # no sign for the space before them
        (make([*"ab"], pre_tokenizers.Whitespace()), "a b c", 1),  # spaces go by design
    ],
)
def test_kinds_of_files(tokenizer, text, lost):
    assert tokenizer.count_lost(text) == lost


def test_the_command_says_what_is_lost(tmp_path, capsys):
    of_bytes([b for b in BYTES if b != "x"]).save(tmp_path)
    (tmp_path / "a.txt").write_text("axbx")
    arguments = ["--workers", "1", "--heldout-fraction", "0", "--tokenizer", str(tmp_path)]
    source = str(tmp_path / "a.txt")
    data_cli.prepare([*arguments, "--out", str(tmp_path / "out"), "--input", source])
    line = f"left out   {source}: 2 characters that the tokenizer has no token for"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.BPE(vocab={"a": 0}, merges=[], unk_token="<unk>"), "cannot encode a text"),
        (models.Unigram([("a", -1.0), ("b", -2.0)]), "cannot encode a text"),
        (models.WordLevel({"a": 0}, unk_token="<unk>"), "cannot encode a text"),
        (models.BPE(), "has no tokens"),
    ],
)
def test_a_file_that_names_an_unknown_token_without_having_it(tmp_path, model, message):
    (tmp_path / "tokenizer.json").write_text(Tokenizer(model).to_str())
    with pytest.raises(DataError, match=rf"tokenizer\.json {message}.*: give another file"):
        load_tokenizer(tmp_path).encode("xyz")

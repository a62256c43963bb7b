"""Tokenizers: round trips, special tokens, files, and the command that trains one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfree_jax.cli import tokenizer as tokenizer_cli
from mmfree_jax.data import json_tokenizer, sentencepiece_tokenizer
from mmfree_jax.data import tokenizer as tokenizer_lib
from mmfree_jax.data.text_segments import segments
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import ConfigError, DataError

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "we",
    "that",
    "our",
    "have",
    "people",
    "government",
    "states",
    "congress",
    "nation",
    "peace",
]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 200)) + ".\n" for i in range(40)]
HARD = [
    "",
    " ",
    "  two  spaces ",
    "a\r\n\tb\n\n\nc",
    "naïve 日本語 🙂👩‍👩‍👧",
    "\x00\x7f\ufeff",
    "e\u0301",
]


@pytest.fixture(scope="module")
def bpe():
    # With words of several newlines and spaces, which a cut must not break.
    return train_bpe([t + "\n\nwe\n \n \nthe" * 9 for t in TEXTS], 320)


@pytest.fixture(scope="module")
def mistral(mistral_model):
    return tokenizer_lib.load_tokenizer(mistral_model)


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    ends = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(ends) == text
    assert tokenizer.decode(np.array(ends)) == text


@given(st.text())
def test_byte_round_trip(text):
    check_round_trip(tokenizer_lib.ByteTokenizer(), text)


@given(st.binary())
def test_byte_tokenizer_keeps_any_bytes(data):
    assert tokenizer_lib.ByteTokenizer().decode_bytes([256, *data, 257, 300]) == data


@settings(max_examples=200)
@given(text=st.text())
def test_bpe_round_trip(bpe, text):
    check_round_trip(bpe, text)


@pytest.mark.parametrize("text", [*HARD, "<|bos|> <|eos|>", *TEXTS[:2]])
def test_hard_texts(bpe, text):
    check_round_trip(tokenizer_lib.ByteTokenizer(), text)
    check_round_trip(bpe, text)


def test_bpe_learns_words_and_is_deterministic(bpe):
    assert bpe.vocab_size == 320
    assert (bpe.bos_id, bpe.eos_id) == (0, 1)
    assert len(bpe.encode(TEXTS[0])) < 0.4 * len(TEXTS[0])
    first = train_bpe(TEXTS, 310)
    assert train_bpe(iter(TEXTS), 310).sha256 == first.sha256
    assert first.sha256 != bpe.sha256


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_sentencepiece_round_trip(mistral, text):
    check_round_trip(mistral, text)


@settings(max_examples=100)
@given(
    parts=st.lists(st.sampled_from([*HARD, *WORDS, "\n", "a\n\n b", " \r\n", "Ünï\nc\t\n", "1\n'"]))
)
def test_cuts_change_nothing(mistral, bpe, parts):
    text = " ".join(parts)
    assert "".join(segments(text, 3)) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_tokenizer, "_SEGMENT", 3)
        patch.setattr(json_tokenizer, "_SEGMENT", 3)
        for tokenizer in (mistral, bpe):
            assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("size", range(1, 9))
def test_cuts_keep_runs_of_white_space(mistral, bpe, size, monkeypatch):
    monkeypatch.setattr(sentencepiece_tokenizer, "_SEGMENT", size)
    monkeypatch.setattr(json_tokenizer, "_SEGMENT", size)
    text = "the\n\nwe\n \n \nthe" * 20
    for tokenizer in (mistral, bpe):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_long_texts_are_cut(mistral, bpe):
    assert mistral._skip == 1
    assert bpe._can_cut
    text = "the people\n" * 1000
    assert len(segments(text, 100)) == 101
    assert segments("", 100) == [""]


def test_sentencepiece_cut_is_not_made_where_newlines_are_normalised(tmp_path):
    """A model that folds white space may only be given whole texts."""
    import sentencepiece

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = tokenizer_lib.load_tokenizer(tmp_path / "m.model")
    assert tokenizer._skip is None
    text = "the\nof" * 2000
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_mistral(mistral):
    assert (mistral.unk_id, mistral.bos_id, mistral.eos_id) == (0, 1, 2)
    assert mistral.vocab_size == 32000
    assert mistral.encode("hello world") == [6312, 28709, 1526]
    assert "hello" in mistral.decode([6312, 28709, 40000])


def test_saving_keeps_the_identity(bpe, mistral, tmp_path):
    tokenizers = {"byte": tokenizer_lib.ByteTokenizer(), "bpe": bpe, "mistral": mistral}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / name)
        for place in (tmp_path / name, str(tmp_path / name)):
            loaded = tokenizer_lib.load_tokenizer(place)
            assert tokenizer_lib.identity(loaded) == tokenizer_lib.identity(tokenizer)
            assert loaded.encode("people, peace") == tokenizer.encode("people, peace")
    shas = {t.sha256 for t in tokenizers.values()}
    assert len(shas) == 3


def test_hugging_face_folder(bpe, tmp_path):
    """Start and end come from tokenizer_config.json, as a string or as an object."""
    bpe.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    assert json.loads(config.read_text())["eos_token"] == "<|eos|>"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<|bos|>"}}))
    changed = tokenizer_lib.load_tokenizer(tmp_path)
    assert changed.eos_id == 0
    assert changed.sha256 != bpe.sha256
    config.write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match="no token '<nope>'"):
        tokenizer_lib.load_tokenizer(tmp_path)
    config.unlink()
    assert tokenizer_lib.load_tokenizer(tmp_path / "tokenizer.json").eos_id == 1
    (tmp_path / "run").mkdir()
    bpe.save(tmp_path / "run" / "tokenizer")
    assert tokenizer_lib.load_tokenizer(tmp_path / "run").sha256 == bpe.sha256


def test_half_of_a_surrogate_pair_is_refused(bpe, mistral):
    for tokenizer in (bpe, mistral, tokenizer_lib.ByteTokenizer()):
        for encode in (tokenizer.encode, tokenizer.encode_array):
            with pytest.raises(DataError, match=r"half of a surrogate pair.* at character 2"):
                encode("ab\ud800")


def test_streamed_text_is_never_broken(bpe):
    text_lib = pytest.importorskip("mmfree_jax.infer.text")
    text = "".join(HARD)
    for tokenizer in (tokenizer_lib.ByteTokenizer(), bpe):
        stream = text_lib.TextStream(tokenizer)
        pieces = [stream.push([i]) for i in tokenizer.encode(text)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join([*pieces, stream.flush()]) == text


def test_bad_tokenizers(tmp_path):
    with pytest.raises(DataError, match="does not exist: give 'byte'"):
        tokenizer_lib.load_tokenizer(tmp_path / "no.model")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        tokenizer_lib.load_tokenizer(tmp_path)
    for contents in (b"nothing", b""):
        (tmp_path / "bad.model").write_bytes(contents)
        with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
            tokenizer_lib.load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is not a Hugging Face tokenizer\.json"):
        tokenizer_lib.load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="set --vocab-size 258"):
        train_bpe(TEXTS, 100)
    with pytest.raises(DataError, match=r"supports only \d+ tokens"):
        train_bpe(["abc abc"], 1000)


def test_train_command(tmp_path, capsys):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    args = ["--input", str(source), "--out", str(tmp_path / "t"), "--vocab-size", "300"]
    assert tokenizer_cli.train(args) == 0
    assert "bpe (300 tokens" in capsys.readouterr().out
    first = tokenizer_lib.load_tokenizer(tmp_path / "t")
    assert tokenizer_cli.train(args) == 0  # the same again
    with pytest.raises(DataError, match="holds another tokenizer"):
        tokenizer_cli.train([*args[:-1], "290"])
    assert tokenizer_lib.load_tokenizer(tmp_path / "t").sha256 == first.sha256
    with pytest.raises(ConfigError, match="input"):
        tokenizer_cli.train(["--out", str(tmp_path / "u")])
    with pytest.raises(ConfigError, match="vocab-size"):
        tokenizer_cli.train([*args[:-1], "many"])
    with pytest.raises(ConfigError, match="99999999999: set at most 2147483647"):
        tokenizer_cli.train([*args[:-1], "99999999999"])
    with pytest.raises(DataError, match="16777217: set --vocab-size 16777216 or less"):
        tokenizer_cli.train([*args[:-1], "16777217"])


def test_held_out_documents_are_not_trained_on(tmp_path, monkeypatch):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    seen = []
    monkeypatch.setattr(
        "mmfree_jax.data.train_bpe.train_bpe", lambda texts, *_, **__: seen.extend(texts) or bail()
    )

    class StopError(Exception):
        pass

    def bail():
        raise StopError

    args = ["--input", str(source), "--out", str(tmp_path / "t"), "--heldout-fraction", "0.3"]
    with pytest.raises(StopError):
        tokenizer_cli.train(args)
    assert 20 <= len(seen) < 36

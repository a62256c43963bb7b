"""Special tokens: which ones a file names, and that no text turns into one."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mmfree_jax.data.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import DataError
from mmfree_jax.export import chat
from mmfree_jax.infer.text import encode_prompt

ADDED = ["<pad>", "<s>", "</s>", "<|im_end|>"]


def byte_level(special: bool = True) -> tokenizers.Tokenizer:
    """Bytes alone, behind the tokens ADDED (ids 0 to 3)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*ADDED, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=special) for t in ADDED])
    return tokenizer


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        (None, (1, 2)),
        ({"bos_token": None, "eos_token": "<|im_end|>"}, (None, 3)),
        ({"bos_token": "<pad>", "eos_token": None}, (0, None)),
        ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "<pad>"}}, (1, 0)),
        ({"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}, (None, 3)),
        ({"eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizerFast"}, (1, 3)),
        ({"model_max_length": 1024}, (1, 2)),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_which_tokens_are_the_ends(config, ends, mark, tmp_path):
    (tmp_path / "tokenizer.json").write_text(mark + byte_level().to_str())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(mark + json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ends
    assert encode_prompt(tokenizer, "a")[:-1] == ([] if ends[0] is None else [ends[0]])
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert (again.bos_id, again.eos_id, again.sha256) == (*ends, tokenizer.sha256)


@pytest.mark.parametrize(
    ("config", "older", "ends"),
    [
        (None, {"eos_token": "<|im_end|>"}, (1, 3)),
        ({}, {"bos_token": {"content": "<pad>"}, "eos_token": None}, (0, None)),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"bos_token": "<s>"}, (1, None)),
        ({"bos_token": None}, {"bos_token": "<s>", "eos_token": "<|im_end|>"}, (None, 3)),
    ],
)
def test_an_older_map_of_special_tokens_fills_in_what_is_not_said(config, older, ends, tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a mapping"),
        ('{"bos_token": 1}', "bos_token is 1"),
        ('{"eos_token": {"id": 1}}', "eos_token is {'id': 1}"),
        ('{"bos_token": ""}', "no token ''"),
        ('{"bos_token": "<s>", "bos_token": null}', "key 'bos_token' occurs twice"),
    ],
)
def test_a_config_that_is_wrong(text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def unigram() -> JsonTokenizer:
    words = ["<unk>", "<s>", "</s>", *"<>/s▁ab"]
    model = models.Unigram([(w, -1.0 if len(w) == 1 else -0.1) for w in words], 0)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return JsonTokenizer(tokenizer.to_str().encode())


def sentence_piece() -> SentencePieceTokenizer:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(  # type: ignore[attr-defined]
        sentence_iterator=iter(["a b < s > / abab ba"] * 50),
        model_writer=file,
        vocab_size=20,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(file.getvalue())


def not_marked() -> JsonTokenizer:
    """Ends that the file lists as ordinary added words."""
    return JsonTokenizer(byte_level(special=False).to_str().encode(), "<s>", "</s>")


def word_level() -> JsonTokenizer:
    vocab = {w: i for i, w in enumerate(["<s>", "</s>", "<unk>", "a", "b"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return JsonTokenizer(tokenizer.to_str().encode())


def trained() -> JsonTokenizer:
    return train_bpe(["a <|bos|> b <|eos|>"] * 9, 258)


MAKERS = [unigram, sentence_piece, not_marked, word_level, trained]


@pytest.mark.parametrize("make", MAKERS)
def test_text_is_never_a_special_token(make):
    tokenizer: Tokenizer = make()
    ends = {tokenizer.bos_id, tokenizer.eos_id}
    assert len(ends) == 2
    assert None not in ends
    names = ("<|bos|>", "<|eos|>") if make is trained else ("<s>", "</s>")
    for text in (names[0], f"a {names[1]} b", f"a{names[1]}{names[0]}b"):
        ids = tokenizer.encode(text)
        assert ids
        assert not ends & set(ids)
        assert tokenizer.encode_array(text).tolist() == ids
        assert encode_prompt(tokenizer, text) == [tokenizer.bos_id, *ids]
        if make is not word_level:  # it has no words for them
            assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_a_sentence_piece_model_without_a_start(tmp_path):
    whole = sentence_piece()
    (tmp_path / "a").mkdir()
    whole.save(tmp_path / "a")
    assert not (tmp_path / "a" / "tokenizer_config.json").exists()
    assert load_tokenizer(tmp_path / "a").sha256 == whole.sha256
    for config, ends in [({"bos_token": None}, (None, 2)), ({"eos_token": None}, (1, None)),
                         ({"bos_token": "<s>"}, (1, 2))]:  # fmt: skip
        (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
        loaded = load_tokenizer(tmp_path / "a")
        assert (loaded.bos_id, loaded.eos_id) == ends
        assert (loaded.sha256 == whole.sha256) == (ends == (1, 2))
        loaded.save(tmp_path / f"b{ends}")
        again = load_tokenizer(tmp_path / f"b{ends}")
        assert (again.bos_id, again.eos_id, again.sha256) == (*ends, loaded.sha256)


def test_a_prompt_in_the_exported_chat(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    encode, decode = chat.load_tokenizer(tmp_path, {"tokenizer": "tokenizer.json"})
    assert not {0, 1, 2, 3} & set(encode("a</s><s>"))
    assert decode(encode("a</s><s>")) == "a</s><s>"
    assert len(Path(chat.__file__).read_text().splitlines()) < 160  # as docs/edge.md says


def test_what_spells_the_token():
    tokenizer = word_level()
    assert tokenizer.encode("a <s> b") == [3, 2, 2, 2, 4]  # three unknown characters
    assert not_marked().decode(not_marked().encode("x</s>y")) == "x</s>y"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"eos_token": "<|im_end|>"},
            r"eos_token is '<\|im_end\|>', that of tokenizer.model is '</s>'",
        ),
        (
            {"bos_token": {"content": "</s>"}},
            "bos_token is '</s>', that of tokenizer.model is '<s>'",
        ),
        ({"bos_token": "<s>", "eos_token": {"content": "</s>"}}, None),
    ],
)
def test_ends_that_a_sentencepiece_model_does_not_have_are_refused(config, message, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(["the river bank", "cold wind over the water"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if message is None:
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    else:
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path)

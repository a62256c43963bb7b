"""Tokenizers of exported folders: other programs feed the model what it was trained on."""

import json

import pytest
import tokenizers

from mmfree_jax.data.tokenizer import (
    BY_NAME,
    ByteTokenizer,
    JsonTokenizer,
    load_tokenizer,
)
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.infer.text import encode_prompt
from mmfree_jax.saved.huggingface_tokenizer import write_tokenizer

TEXTS = [
    "",
    "Fellow citizens of the Senate",
    " two  spaces\n\nand lines\t",
    "é 漢字 \U0001f600 \x00\x7f",
    "it spells <|bos|> and <|eos|>, <|eos|>",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["Fellow citizens of the Senate and of the House. " * 20, "é 漢字"], 290)


def _without_start(tokenizer):
    return JsonTokenizer(tokenizer.text.encode(), None, "<|eos|>")


def _export(folder, tokenizer, **options):
    write_tokenizer(folder, tokenizer, 512, **options)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config


@pytest.mark.parametrize("kind", ["byte", "bpe", "bpe without start"])
def test_an_export_encodes_as_the_run_was_trained(tmp_path, bpe, kind):
    own = {"byte": ByteTokenizer(), "bpe": bpe, "bpe without start": _without_start(bpe)}[kind]
    exported, config = _export(tmp_path, own)
    start = [] if own.bos_id is None else [own.bos_id]
    for text in TEXTS:
        ids = exported.encode(text).ids
        assert ids == [*start, *own.encode(text)]
        if text and start:
            assert ids == encode_prompt(own, text)
        assert exported.encode(text, add_special_tokens=False).ids == own.encode(text)
        assert exported.decode(ids[len(start) :]) == text
    first, second = own.encode("the House"), own.encode("Senate")
    assert exported.encode("the House", "Senate").ids == [*start, *first, *second]
    assert config["add_bos_token"] is bool(start)
    assert config["bos_token"] == ("<|bos|>" if start else None)
    assert config["eos_token"] == "<|eos|>"
    assert config["model_max_length"] == 512
    assert config["split_special_tokens"] is True


def test_the_start_token_is_the_first_id_also_where_that_is_zero(tmp_path, bpe):
    exported, _ = _export(tmp_path, bpe)
    assert bpe.bos_id == 0
    assert exported.encode("of").ids[0] == 0
    assert exported.get_vocab()["<|eos|>"] == 1


def test_bytes_have_their_own_values_as_ids(tmp_path):
    exported, _ = _export(tmp_path, ByteTokenizer())
    assert exported.encode("aé").ids == [256, 97, 195, 169]
    assert exported.get_vocab_size() == 258


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_an_export_is_read_back_the_same(tmp_path, bpe, kind):
    own = ByteTokenizer() if kind == "byte" else bpe
    _export(tmp_path, own)
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id) == (own.bos_id, own.eos_id)
    for text in TEXTS:
        assert again.encode(text) == own.encode(text)
        assert again.decode([own.bos_id, *own.encode(text), own.eos_id]) == text


def test_special_tokens_that_only_the_list_has_stay_special(tmp_path, bpe):
    """Their ids would be lost otherwise; split_special_tokens says that text is text."""
    description = json.loads(bpe.text)
    description["model"]["ignore_merges"] = True
    own = JsonTokenizer(json.dumps(description).encode(), BY_NAME, BY_NAME)
    exported, config = _export(tmp_path, own)
    assert exported.encode("of").ids == [0, *own.encode("of")]
    assert [t["content"] for t in json.loads(exported.to_str())["added_tokens"]] == [
        "<|bos|>",
        "<|eos|>",
    ]
    assert config["split_special_tokens"] is True


def test_the_files_of_an_imported_model_are_kept(tmp_path, bpe):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    bpe.save(source)
    exported, config = _export(target, load_tokenizer(source), originals=source)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert exported.encode("of").ids == bpe.encode("of")
    assert "model_max_length" not in config


def test_a_sentencepiece_model_names_its_tokens(tmp_path, mistral_model):
    own = load_tokenizer(mistral_model)
    write_tokenizer(tmp_path, own, 128)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {k: config[k] for k in ("bos_token", "eos_token", "unk_token")} == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert config["add_bos_token"] is True
    assert config["model_max_length"] == 128

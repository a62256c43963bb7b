"""What lies beside the weights of an export, as transformers and huggingface_hub read it."""

import json

import pytest

pytest.importorskip("torch", reason="torch is not installed: run make torch")

from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mmfree_jax.saved.convert import export_hf, import_hf

TEXT = " two  spaces, é 漢字 \U0001f600\n\x00 <|bos|> <|eos|>"


def test_the_tokenizer_of_a_byte_run(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    ids = tokenizer(TEXT).input_ids
    assert ids == [256, *TEXT.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.decode([*b"ab", 257], skip_special_tokens=True) == "ab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 257, 258)
    assert tokenizer.model_max_length == 64
    assert tokenizer.chat_template is None
    generation = GenerationConfig.from_pretrained(trained.folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (256, 257)


def test_a_chat_template_comes_through_import_and_export(trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    trained.torch_model().save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    chat = [{"role": "user", "content": "we hold"}]
    assert again.apply_chat_template(chat, tokenize=False) == "[user] we hold"


def test_the_card_is_one(trained, tmp_path):
    export_hf(trained.ours, tmp_path / "hf", model_license="apache-2.0")
    card = ModelCard.load(tmp_path / "hf/README.md")
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.text.strip().startswith("# hf\n")
    assert "- steps: 120 of 120" in card.text


def test_several_files_load_as_one(trained, tmp_path):
    export_hf(trained.ours, tmp_path / "hf", shard_bytes=100_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "hf").glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"].values()) == files
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    whole = trained.torch_model().state_dict()
    assert model.state_dict().keys() == whole.keys()
    assert all(bool((x == whole[name]).all()) for name, x in model.state_dict().items())

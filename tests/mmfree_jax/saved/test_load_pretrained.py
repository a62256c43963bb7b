"""load_pretrained on the authors' checkpoint, on runs and on packed models; training from one."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmfree_jax
from mmfree_jax.cli.main import main
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.init_from import initial_params, training_config


@pytest.fixture
def released(authors_package, mistral_model, tmp_path):
    """The authors' development checkpoint as a Hugging Face folder, with Mistral's tokenizer."""
    folder = tmp_path / "released"
    folder.mkdir()
    shutil.copy(authors_package / "dev_config.json", folder / "config.json")
    shutil.copy(authors_package / "dev_model.safetensors", folder / "model.safetensors")
    shutil.copy(mistral_model, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize(("variant", "eps"), [("fused", None), ("vanilla", 1e-8)])
def test_the_released_format_gives_the_authors_logits(authors_package, released, variant, eps):
    if eps is not None:
        config = json.loads((released / "config.json").read_text())
        (released / "config.json").write_text(json.dumps(config | {"linear_norm_eps": eps}))
    model, params = mmfree_jax.load_pretrained(released)
    expected = load_file(authors_package / f"dev_{variant}.safetensors")
    logits = np.asarray(model.apply({"params": params}, expected["input_ids"]))
    assert logits.dtype == np.float32
    error = np.linalg.norm(logits - expected["logits"]) / np.linalg.norm(expected["logits"])
    assert error <= (1e-2 if variant == "vanilla" else 1e-5)
    np.testing.assert_array_equal(logits.argmax(-1), expected["logits"].argmax(-1))


def test_the_export_is_what_the_authors_package_loads(released, tmp_path, capsys):
    # A row for each of the tokenizer's 32,000 pieces, where the development model has 256.
    weights, config = released / "model.safetensors", released / "config.json"
    tensors = load_file(weights)
    for name in ("model.embeddings.weight", "lm_head.weight"):
        tensors[name] = np.tile(tensors[name], (125, 1))
    save_file(tensors, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 32000}))
    assert main(["import-hf", str(released), str(tmp_path / "ours")]) == 0
    assert main(["export-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert "hgrn_bit" in capsys.readouterr().out
    theirs = load_file(released / "model.safetensors")
    ours = load_file(tmp_path / "back/model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert (value.shape, value.tobytes()) == (ours[name].shape, ours[name].tobytes()), name
    before = json.loads((released / "config.json").read_text())
    after = json.loads((tmp_path / "back/config.json").read_text())
    del before["transformers_version"]
    assert {k: after.pop(k) for k in before} == before
    assert after == {
        "architectures": ["HGRNBitForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mmfree.HGRNBitConfig",
            "AutoModel": "modeling_mmfree.HGRNBitModel",
            "AutoModelForCausalLM": "modeling_mmfree.HGRNBitForCausalLM",
        },
        "torch_dtype": "float32",
    }
    model_file = released / "tokenizer.model"
    assert (tmp_path / "back/tokenizer.model").read_bytes() == model_file.read_bytes()
    config = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_importing_the_package_is_cheap():
    code = (
        "import sys, mmfree_jax; mmfree_jax.load_pretrained;"
        "assert {'load_pretrained', 'generate', 'LanguageModel'} <= set(dir(mmfree_jax))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, mmfree_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mmfree_jax.nonsense


@pytest.fixture(scope="module")
def folders(byte_data, tmp_path_factory):
    """A trained run, its packed model and its export."""
    root = tmp_path_factory.mktemp("models")
    train = [
        *("--preset", "tiny", "--steps", "3", "--batch-size", "8", "--data.paths", str(byte_data)),
        *("--data.seq-len", "16", "--model.intermediate-size", "32", "--model.num-layers", "2"),
        *("--model.hidden-size", "32", "--eval.batches", "0", "--eval.sample-tokens", "0"),
        *("--log.no-tensorboard", "--log.progress", "none", "--optimizer.warmup-steps", "0"),
    ]
    assert main(["train", *train, "--run-dir", str(root / "run")]) == 0
    pack = ["--model", str(root / "run"), "--out", str(root / "packed")]
    assert main(["pack", *pack, "--agreement-prompts", "0"]) == 0
    assert main(["export-hf", str(root / "run"), str(root / "hf")]) == 0
    return root, train


@pytest.mark.slow
def test_a_run_its_export_and_its_packed_model_agree(folders):
    root, _ = folders
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    logits = {}
    for name in ("run", "hf", "packed"):
        model, params = mmfree_jax.load_pretrained(root / name, compute_dtype="float32")
        logits[name] = np.asarray(model.apply({"params": params}, tokens))
    np.testing.assert_array_equal(logits["run"], logits["hf"])
    # The packed model keeps norms and the embedding in bfloat16.
    error = np.linalg.norm(logits["packed"] - logits["run"]) / np.linalg.norm(logits["run"])
    assert error < 0.1
    with pytest.raises(CheckpointError, match="no master weights"):
        initial_params(root / "packed", mmfree_jax.preset("tiny"))


@pytest.mark.slow
def test_training_starts_from_an_export(folders, capsys):
    root, train = folders
    _, start = mmfree_jax.load_pretrained(root / "hf")
    flags = [*train, "--init-from", str(root / "hf"), "--optimizer.learning-rate", "1e-12"]
    # The model's shape comes from the folder.
    for flag in ("--model.intermediate-size", "--model.num-layers", "--model.hidden-size"):
        at = flags.index(flag)
        del flags[at : at + 2]
    assert main(["train", *flags, "--run-dir", str(root / "tuned")]) == 0
    capsys.readouterr()
    _, tuned = mmfree_jax.load_pretrained(root / "tuned")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start, tuned)


def test_training_from_another_model_is_refused(released):
    base = mmfree_jax.preset("tiny")
    wrong = dataclasses.replace(training_config(released, base.model), num_layers=3)
    with pytest.raises(ConfigError, match=r"model\.num_layers is 3, there 2"):
        initial_params(released, dataclasses.replace(base, model=wrong))


def test_training_keeps_its_own_ways_of_running(released):
    base = ModelConfig(compute_dtype="bfloat16", remat="dots", initializer_range=0.5)
    config = training_config(released, base)
    assert (config.compute_dtype, config.remat) == ("bfloat16", "dots")
    assert (config.hidden_size, config.vocab_size, config.num_layers) == (64, 256, 2)
    assert config.family == "matmulfree"
    assert LanguageModel(config).config is config

"""Hugging Face folders that are refused, and what of their configs is read, kept or passed over."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from hf_folders import HGRN, LLAMA, write_folder
from initial_params import initial_params
from safetensors.numpy import save_file

from mmfree_jax.errors import CheckpointError, ConfigError, DataError, OutputError
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.convert import export_hf, import_hf
from mmfree_jax.saved.end_tokens import end_ids
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.pretrained import load_pretrained


def test_every_fault_is_listed_at_once(tmp_path):
    tensors = write_folder(tmp_path / "hf", HGRN)
    del tensors["model.norm.weight"]
    tensors["surplus"] = np.zeros(3, np.float32)
    tensors["lm_head.norm.weight"] = np.zeros(5, np.float32)
    tensors["model.layers.0.attn_norm.weight"] = np.zeros(16, np.int32)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path / "hf")
    message = str(caught.value)
    assert "5 places" in message
    for part in (
        "model.norm.weight: missing",
        "surplus: not part of this model",
        "lm_head.norm.weight: shape [5], expected [16]",
        "model.layers.0.attn_norm.weight: dtype I32",
        "model.layers.1.mlp.down_proj.weight: values that are not finite",
    ):
        assert part in message
    assert "\n" not in message


def test_values_that_are_not_finite_alone(tmp_path):
    tensors = write_folder(tmp_path / "hf", HGRN)
    tensors["model.embeddings.weight"][0, 0] = np.inf
    tensors["lm_head.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .*embeddings\.weight: values"):
        load_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_may_not_leave_the_folder(tmp_path, target):
    write_folder(tmp_path / "hf", HGRN, shards=2)
    shutil.copy(tmp_path / "hf/model-0.safetensors", tmp_path / "model.safetensors")
    index = tmp_path / "hf/model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = target
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="leave the folder are refused"):
        load_pretrained(tmp_path / "hf")


def test_a_pipe_in_an_index_is_not_waited_for(tmp_path):
    write_folder(tmp_path / "hf", HGRN, shards=2)
    (tmp_path / "hf/model-1.safetensors").unlink()
    os.mkfifo(tmp_path / "hf/model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors .*a named pipe, not a file"):
        load_pretrained(tmp_path / "hf")


def test_a_message_names_a_hundred_faults_at_most(tmp_path):
    tensors = write_folder(tmp_path / "hf", HGRN)
    surplus = {f"surplus.{i:03}": np.zeros(1, np.float32) for i in range(150)}
    save_file(tensors | surplus, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"150 places: .*surplus\.099: .*; and 50 more: "):
        load_pretrained(tmp_path / "hf")


def test_pickled_weights_are_refused(tmp_path):
    write_folder(tmp_path / "hf", HGRN)
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is pickled"):
        load_pretrained(tmp_path / "hf/pytorch_model.bin")
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        load_pretrained(tmp_path / "hf")


def test_damaged_files(tmp_path):
    write_folder(tmp_path / "hf", HGRN)
    file = tmp_path / "hf/model.safetensors"
    contents = file.read_bytes()
    for damaged in (contents[: len(contents) // 2], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_pretrained(tmp_path / "hf")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (HGRN, {"model_type": "mamba"}, "model_type is 'mamba'"),
        (HGRN, {"model_type": ["hgrn_bit"]}, r"model_type is \['hgrn_bit'\]"),
        (HGRN, {"model_type": "x" * 10_000}, "model_type is 'x{99}\\.\\.\\.: only hgrn_bit"),
        # Nothing is made of so many layers, names for example, before they are refused.
        (
            HGRN,
            {"num_hidden_layers": 10**9},
            r"num_layers is 1000000000: set .* \[1, 10000",
        ),
        (LLAMA, {"num_hidden_layers": 1e30}, "num_layers is 1000000000000000019884624838656: set"),
        (
            LLAMA,
            {"hidden_size": 2**40},
            "hidden_size is 1099511627776: set at most 2147483647",
        ),
        (HGRN, {"vocab_size": 2**31}, "vocab_size is 2147483648: set at most 2147483647"),
        (HGRN, {"intermediate_size": 2**31}, "intermediate_size is 2147483648: set at most"),
        (HGRN, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (HGRN, {"attn_mode": "other"}, "attn_mode is 'other'"),
        (HGRN, {"num_heads": 3}, "num_heads is 3"),
        (HGRN, {"expand_ratio": 2}, "expand_ratio is 2"),
        (HGRN, {"hidden_size": "16"}, "hidden_size is '16'"),
        (HGRN, {"num_hidden_layers": None}, "num_hidden_layers is None"),
        (HGRN, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        (LLAMA, {"num_key_value_heads": 3}, "num_kv_heads is 3"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"qkv_bias": True}, "qkv_bias is True"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window is 4096"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling is 8.0, a field that is not known"),
        (LLAMA, {"n_kv_heads": 1}, "n_kv_heads is 1, a field that is not known"),
        (LLAMA, {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, a field that is not known"),
        (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (LLAMA, {"rope_theta": "10000"}, "rope_theta is '10000'"),
        (LLAMA, {"rope_theta": 0}, "rope_theta is 0"),
        (LLAMA, {"rope_scaling": {"factor": 2.0}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters is"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters is",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "rope_parameters is",
        ),
        (
            LLAMA,
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta is 10000.0 and rope_parameters.rope_theta is 1000000.0",
        ),
        (LLAMA, {"rope_scaling": {"type": ["linear"]}}, "rope_scaling is"),
        (LLAMA, {"layer_types": [{"type": "full_attention"}] * 2}, "layer_types is"),
        (LLAMA, {"hidden_size": float("nan")}, "hidden_size is nan: a number above 0"),
        (HGRN, {"num_hidden_layers": float("inf")}, "num_hidden_layers is inf: a number above 0"),
        (HGRN, {"use_short_conv": "false"}, "use_short_conv is 'false'"),
        (HGRN, {"use_lower_bound": 1}, "use_lower_bound is 1"),
        (HGRN, {"feature_map": "relu"}, "feature_map is 'relu', a field that is not known"),
        (HGRN, {"rope_theta": 1e4}, "rope_theta is 10000.0, a field that is not known"),
    ],
)
def test_configs_that_are_not_implemented_are_refused_by_name(tmp_path, base, change, named):
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    with pytest.raises(ConfigError, match=named):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 250000}, 250000.0),
        ({"rope_scaling": None, "rope_parameters": {}}, 10_000.0),
    ],
)
def test_every_spelling_of_the_rotary_base_is_read(tmp_path, change, theta):
    base = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    assert huggingface.read_config(tmp_path).config.rope_theta == theta


@pytest.mark.parametrize("value", ["2", [1, "2"], -1, 2.0, True, [None]])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is"):
        end_ids(tmp_path)


def test_fields_that_change_nothing_are_passed_over(tmp_path):
    harmless = {
        "_name_or_path": "x",
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "dtype": "bfloat16",
        "eos_token_id": [1, 2],
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 99,
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 2,
        "sliding_window": None,
        "something_new": None,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_sliding_window": False,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    plain = huggingface.read_config(tmp_path).config
    file.write_text(json.dumps(LLAMA | harmless))
    assert huggingface.read_config(tmp_path).config == plain


def test_export_refuses_what_no_package_computes(tmp_path):
    config = ModelConfig(
        vocab_size=8, hidden_size=16, num_layers=1, intermediate_size=16, glu_linear=DENSE
    )
    params = initial_params(config)
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", config, params)
    model, loaded = load_pretrained(tmp_path / "m")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(ConfigError, match="hybrid"):
        export_hf(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_tokenizer_is_damaged_is_not_imported(tmp_path):
    write_folder(tmp_path / "hf", HGRN)
    (tmp_path / "hf/tokenizer.json").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"hf/tokenizer\.json is not a Hugging Face tokenizer"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_target_that_exists_is_kept(tmp_path):
    write_folder(tmp_path / "hf", HGRN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="was not written by `mmfree import-hf`"):
            import_hf(tmp_path / "hf", tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out/precious").read_text() == "x"
    (tmp_path / "out/precious").unlink()
    import_hf(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(OutputError, match="pass --overwrite"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    import_hf(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".mmfree-output.json",
        "model.yaml",
        "params.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]

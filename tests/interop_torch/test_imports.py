"""Folders that transformers writes, read as Transformer++ models: its logits, in and back out."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run make torch")

import transformers  # noqa: E402

from mmfree_jax import infer  # noqa: E402
from mmfree_jax.saved.convert import export_hf, import_hf  # noqa: E402
from mmfree_jax.saved.pretrained import load_pretrained  # noqa: E402

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
FOLDERS = {
    "llama": ("Llama", {}, "llama"),
    "llama_bias": ("Llama", {"attention_bias": True}, "llama"),
    "llama_head_dim": ("Llama", {"head_dim": 6}, "llama"),
    "mistral": ("Mistral", {"sliding_window": None}, "llama"),
    "mistral_window": ("Mistral", {"sliding_window": 128, "head_dim": 16}, "llama"),
    "mistral_heads": (
        "Mistral",
        {"sliding_window": None, "num_attention_heads": 6, "head_dim": 8},
        "mistral",
    ),
    "qwen2": ("Qwen2", {}, "qwen2"),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}, "qwen2"),
    "qwen2_window_layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4}, "qwen2"),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FOLDERS |= {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}, "llama"),
    "qwen3": ("Qwen3", {"head_dim": 12}, "qwen3"),
    "qwen3_bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}, "qwen3"),
    "linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, "qwen2"),
}
TOKENS = np.random.default_rng(1).integers(0, 48, (2, 100))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours(folder):
    model, params = load_pretrained(folder)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, TOKENS))(params))


@pytest.mark.parametrize("name", FOLDERS)
def test_their_models_give_the_same_logits_here_and_back_there(tmp_path, name):
    kind, changes, exported = FOLDERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(TINY | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # none as initialised: biases are zeros there, and norms ones
        for key, x in model.named_parameters():
            x.copy_(torch.randn(x.shape) * 0.3 + ("norm" in key))
    model.save_pretrained(tmp_path / "hf")
    expected = theirs(model)
    np.testing.assert_allclose(ours(tmp_path / "hf"), expected, rtol=1e-4, atol=1e-4)
    # Token after token, from the cache.
    prompts = TOKENS[:, :20]
    text = model.generate(torch.tensor(prompts), max_new_tokens=12, do_sample=False)
    loaded = load_pretrained(tmp_path / "hf")
    found = infer.generate(*loaded, prompts.tolist(), max_new_tokens=12, temperature=0)
    assert [list(row) for row in found.tokens] == text[:, 20:].tolist()

    import_hf(tmp_path / "hf", tmp_path / "ours")
    done = export_hf(tmp_path / "ours", tmp_path / "back")
    assert done.model_type == exported
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_allclose(theirs(back), expected, rtol=1e-5, atol=1e-5)

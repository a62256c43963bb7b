"""Hugging Face folders of random weights."""

import json

import numpy as np
from safetensors.numpy import save_file

from mmfree_jax.saved import huggingface
from mmfree_jax.saved.tensor_names import tensor_map

HGRN = {
    "model_type": "hgrn_bit",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


LLAMA = HGRN | {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def write_folder(folder, config, *, dtype=np.float32, seed=0, shards=1):
    """A Hugging Face folder of random weights; returns the tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = tensor_map(huggingface.read_config(folder).config)
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.normal(size=slot.shape) * 0.3 + (len(slot.shape) == 1)).astype(dtype)
        for name, (slot, *_) in names.items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    for k in range(shards):
        part = dict(list(tensors.items())[k::shards])
        save_file(part, folder / f"model-{k}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{k}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors

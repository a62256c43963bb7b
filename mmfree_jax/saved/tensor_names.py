"""The names of tensors in Hugging Face folders, and the part of our parameters that each one is."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmfree_jax.errors import CheckpointError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.tensors import Slot, TensorFolder, TensorMap

_HEAD = "lm_head.weight"


def tensor_map(config: ModelConfig, *, tied: bool = False) -> TensorMap:
    """Stored names, and the part of our parameters that each one is.

    Args:
      config: of the model.
      tied: the head is stored as the embedding alone.
    """
    slots: dict[str, tuple[Slot, ...]] = {}
    width, vocab = config.hidden_size, config.vocab_size
    hgrn = config.mixer == "mlgru"
    embedding = "model.embeddings.weight" if hgrn else "model.embed_tokens.weight"
    slots[embedding] = (Slot("embedding/weight", (vocab, width)),)
    head = Slot("head/weight", (vocab, width))
    if tied:
        slots[embedding] += (head,)
    else:
        slots[_HEAD] = (head,)
    if config.head_linear.input_norm:
        slots["lm_head.norm.weight"] = (Slot("head/norm_scale", (width,)),)
    slots["model.norm.weight"] = (Slot("final_norm/scale", (width,)),)
    if hgrn and config.use_lower_bound:
        shape = (config.num_layers, width)
        slots["model.lower_bounds"] = (Slot("lower_bounds", shape),)
    block = list(_hgrn_block(config) if hgrn else _llama_block(config))
    for layer in range(config.num_layers):
        for name, path, shape, row in block:
            slot = Slot(f"blocks/{path}", shape, layer, row)
            slots[f"model.layers.{layer}.{name}"] = (slot,)
    return slots


_BlockRow = tuple[str, str, tuple[int, ...], int]


def _hgrn_block(config: ModelConfig) -> Iterator[_BlockRow]:
    width, m, inner = config.hidden_size, config.glu_size, config.state_size
    yield "attn_norm.weight", "mixer_norm/scale", (width,), 0
    yield "mlp_norm.weight", "glu_norm/scale", (width,), 0
    yield "attn.g_norm.weight", "mixer/gate_norm/scale", (inner,), 0
    if config.short_conv and config.share_short_conv:
        yield "attn.h_conv1d.weight", "mixer/conv/kernel", (width, 1, config.short_conv), 0
    elif config.short_conv:
        for p in "if":
            shape = (inner, 1, config.short_conv)
            yield f"attn.{p}_conv1d.weight", f"mixer/{p}_conv/kernel", shape, 0
    linears = [(f"attn.{p}_proj", f"mixer/{p}_proj", inner, width) for p in "ifg"]
    linears.append(("attn.o_proj", "mixer/o_proj", width, inner))
    linears.append(("mlp.gate_proj", "glu/gate_up_proj", 2 * m, width))
    linears.append(("mlp.down_proj", "glu/down_proj", width, m))
    for name, path, out_features, in_features in linears:
        yield f"{name}.weight", f"{path}/weight", (out_features, in_features), 0
        yield f"{name}.norm.weight", f"{path}/norm_scale", (in_features,), 0


def _llama_block(config: ModelConfig) -> Iterator[_BlockRow]:
    width, m = config.hidden_size, config.glu_size
    queries, keys = config.query_size, config.key_size
    yield "input_layernorm.weight", "mixer_norm/scale", (width,), 0
    yield "post_attention_layernorm.weight", "glu_norm/scale", (width,), 0
    shapes = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    if config.qk_norm:
        for p in "qk":
            yield f"self_attn.{p}_norm.weight", f"mixer/{p}_norm/scale", (config.head_channels,), 0
    biased = set("" if config.attention_bias == "none" else config.attention_bias)
    for p, shape in shapes.items():
        yield f"self_attn.{p}_proj.weight", f"mixer/{p}_proj/weight", shape, 0
        if p in biased:
            yield f"self_attn.{p}_proj.bias", f"mixer/{p}_proj/bias", shape[:1], 0
    yield "mlp.gate_proj.weight", "glu/gate_up_proj/weight", (m, width), 0
    yield "mlp.up_proj.weight", "glu/gate_up_proj/weight", (m, width), m
    yield "mlp.down_proj.weight", "glu/down_proj/weight", (width, m), 0


def known_extra(name: str, *, tied: bool) -> bool:
    """Whether a stored tensor that we have no place for is known not to be a weight."""
    # The authors' module creates q_conv1d where the convolutions are not shared, and never calls
    # it.
    return name.endswith(("rotary_emb.inv_freq", "attn.q_conv1d.weight")) or (
        tied and name == _HEAD
    )


def check_tied_head(tensors: TensorFolder, slots: TensorMap) -> None:
    """Refuses a head that is stored beside the embedding, which it should equal, and does not.

    Some versions of transformers use it, others the embedding in its place.

    Raises:
      CheckpointError: the two differ.
    """
    embedding = next(name for name, found in slots.items() if found[0].path == "embedding/weight")
    if not {_HEAD, embedding} <= tensors.names:
        return
    if not np.array_equal(tensors.read(_HEAD), tensors.read(embedding)):
        raise CheckpointError(
            f"{tensors.folder}: {_HEAD} differs from {embedding}, though tie_word_embeddings is "
            "true: set that to false in a copy of config.json to use it, or remove the tensor"
        )


def stored_tensor(leaf: Any, slot: Slot) -> np.ndarray:
    """The part of a parameter that a stored tensor holds."""
    if slot.layer is not None:
        leaf = leaf[slot.layer]
    rows = slot.shape[0]
    if leaf.shape[0] != rows:
        leaf = leaf[slot.row : slot.row + rows]
    return np.asarray(leaf).reshape(slot.shape)

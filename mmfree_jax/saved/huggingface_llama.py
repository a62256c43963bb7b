"""The Transformer++ in Hugging Face folders: llama, and those that differ from it in options.

One model of ours computes them all. Which of them an export is, its options say.
"""

from typing import Any, Literal

from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.saved.huggingface_fields import Fields
from mmfree_jax.saved.huggingface_rope import read_rope, write_scaling

LLAMA, MISTRAL, QWEN2, QWEN3 = "llama", "mistral", "qwen2", "qwen3"
_ARCHITECTURES = {
    LLAMA: "LlamaForCausalLM",
    MISTRAL: "MistralForCausalLM",
    QWEN2: "Qwen2ForCausalLM",
    QWEN3: "Qwen3ForCausalLM",
}

_COMMON: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = _COMMON | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# What transformers' configuration classes fill in for a field that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    LLAMA: _COMMON | {"attention_bias": False, "mlp_bias": False},
    MISTRAL: _COMMON
    | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    QWEN2: _QWEN,
    QWEN3: _QWEN | {"head_dim": 128, "attention_bias": False},
}


def read(fields: Fields) -> ModelConfig:
    """The config of our model.

    Raises:
      ConfigError: something that is not implemented is asked for.
    """
    kind = fields["model_type"]
    fields.require(("hidden_act",), ("silu", "swish"))
    if kind == LLAMA:
        fields.require(("mlp_bias",), (False, None))
    if "sliding_window" in fields.defaults:
        _check_window(fields)
    bias: Literal["none", "qkv", "qkvo"] = "qkvo" if fields.flag("attention_bias") else "none"
    if kind == QWEN2:
        bias = "qkv"
    width, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    kv_heads = fields.number("num_key_value_heads", optional=True)
    head_dim = fields.number("head_dim", optional=True)
    theta, scaling = read_rope(fields.file, fields.raw, 10_000.0)
    return ModelConfig(
        mixer="attention",
        vocab_size=fields.number("vocab_size"),
        hidden_size=width,
        num_layers=fields.number("num_hidden_layers"),
        intermediate_size=fields.number("intermediate_size"),
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim is not None and head_dim * heads == width else head_dim,
        attention_bias=bias,
        qk_norm=kind == QWEN3,
        rope_theta=theta,
        rope_scaling=scaling,
        mixer_linear=DENSE,
        glu_linear=DENSE,
        head_linear=DENSE,
        norm_eps=fields.number("rms_norm_eps", float),
        initializer_range=fields.number("initializer_range", float),
        compute_dtype="float32",
        residual_dtype="float32",
    )


def _check_window(fields: Fields) -> None:
    """Refuses a window of attention that a row of the greatest length would not fit into."""
    windowed = "use_sliding_window" not in fields.defaults or fields.flag("use_sliding_window")
    window = fields.number("sliding_window", optional=True) if windowed else None
    if window is None:
        return
    longest = fields.number("max_position_embeddings")
    # The first layers of a Qwen have none.
    full = fields.number("max_window_layers") if "max_window_layers" in fields.defaults else 0
    if window < longest and full < fields.number("num_hidden_layers"):
        raise fields.refuse(
            "sliding_window",
            f"not supported where it is shorter than max_position_embeddings ({longest}): use a "
            "model without it",
        )


def model_type_of(config: ModelConfig) -> str:
    """The architecture that computes a Transformer++.

    Raises:
      ConfigError: none does.
    """
    if config.qk_norm and config.attention_bias == "qkv":
        raise ConfigError(
            "model.attention_bias is 'qkv' with qk_norm: no Hugging Face architecture computes "
            "this model"
        )
    if config.qk_norm:
        return QWEN3
    if config.attention_bias == "qkv":
        return QWEN2
    if config.hidden_size % config.attention_heads == 0:
        return LLAMA
    if config.attention_bias == "none":
        return MISTRAL
    raise ConfigError(
        f"model.attention_bias is {config.attention_bias!r} where num_heads "
        f"({config.attention_heads}) does not divide hidden_size ({config.hidden_size}): no "
        "Hugging Face architecture computes this model"
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that a Transformer++ has of its own.

    Raises:
      ConfigError: as `model_type_of`.
    """
    kind = model_type_of(config)
    fields: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "intermediate_size": config.glu_size,
        "model_type": kind,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.kv_heads,
        "rope_scaling": write_scaling(config.rope_scaling),
        "rope_theta": config.rope_theta,
    }
    if config.head_dim is not None or kind == QWEN3:
        fields["head_dim"] = config.head_channels
    if kind in (LLAMA, QWEN3):
        fields["attention_bias"] = config.attention_bias == "qkvo"
    if kind == LLAMA:
        fields["mlp_bias"] = False
    if kind == MISTRAL:
        fields["sliding_window"] = None
    if kind in (QWEN2, QWEN3):
        fields["use_sliding_window"] = False
    return fields

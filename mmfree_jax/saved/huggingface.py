"""Hugging Face model folders: their config fields, to ours and back; names are `tensor_names`'.

Read and written: `hgrn_bit` (the MatMul-free models as their authors release them) and the
Transformer++ (`huggingface_llama.py`). A config value whose meaning is not implemented is refused
by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import BITLINEAR, DENSE, ModelConfig
from mmfree_jax.readable import brief
from mmfree_jax.saved import huggingface_llama
from mmfree_jax.saved.huggingface_fields import Fields, check_unread
from mmfree_jax.saved.kinds import HUGGINGFACE_CONFIG as CONFIG
from mmfree_jax.saved.remote_code import auto_map
from mmfree_jax.text_files import read_json

HGRN_BIT = "hgrn_bit"
# `hgrn_bit` with weights at 2 bits, which is ours alone: written for PyTorch, and not read back.
HGRN_BIT_PACKED = "hgrn_bit_packed"

# What the authors' configuration class fills in for a field that config.json leaves out.
_HGRN_DEFAULTS: dict[str, Any] = {
    "attn_mode": "fused_recurrent",
    "num_heads": 1,
    "expand_ratio": 1,
    "use_short_conv": False,
    "conv_size": 4,
    "share_conv_kernel": True,
    "use_lower_bound": True,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    # Not one of theirs: their code fixes it (see docs/interop.md).
    "linear_norm_eps": 1e-6,
}
# Without a default: a config must say them.
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder's config.json says.

    Attributes:
      model_type: "hgrn_bit", or one of `huggingface_llama.DEFAULTS`.
      config: of our model.
      tied: whether the head's matrix is the embedding's (loaded as a copy).
      raw: all fields.
    """

    model_type: str
    config: ModelConfig
    tied: bool
    raw: dict[str, Any]


def read_config(folder: Path) -> HuggingFaceModel:
    """Reads config.json.

    Raises:
      ConfigError: it is missing, malformed, or asks for something that is not implemented; the
        message names the field and its value.
    """
    file = folder / CONFIG
    try:
        raw = read_json(file)
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}; give the folder of a model") from e
    except ValueError as e:
        raise ConfigError(f"{file} is not valid JSON ({e}): fetch it again") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is not a mapping of fields: fetch it again")
    defaults = {HGRN_BIT: _HGRN_DEFAULTS} | huggingface_llama.DEFAULTS
    kind = raw.get("model_type")
    if kind == HGRN_BIT_PACKED:
        raise ConfigError(
            f"{file}: model_type is {kind!r}, an export at 2 bits that PyTorch reads: give the "
            "packed model that it was made from"
        )
    if not isinstance(kind, str) or kind not in defaults:
        raise ConfigError(
            f"{file}: model_type is {brief(kind)}: only {', '.join(defaults)} models are read"
        )
    fields = Fields(file, raw, defaults[kind])
    check_unread(file, raw, {*fields.defaults, *_SHAPE})
    read = _from_hgrn_bit if kind == HGRN_BIT else huggingface_llama.read
    config = read(fields)
    return HuggingFaceModel(kind, config, fields.flag("tie_word_embeddings"), raw)


def _from_hgrn_bit(fields: Fields) -> ModelConfig:
    # The recurrence and the gate norm act on each channel alone, so that neither the number of
    # heads nor the name of the kernel changes what is computed.
    fields.require(("attn_mode",), ("fused_recurrent", "fused_chunk", "chunk"))
    fields.require(("hidden_act",), ("swish", "silu"))
    width = fields.number("hidden_size")
    heads = fields.number("num_heads", optional=True) or 1
    if width % heads:
        raise fields.refuse("num_heads", f"choose a divisor of hidden_size ({width})")
    ratio = fields.number("hidden_ratio", float, optional=True) or 4
    inner = fields.number("intermediate_size", optional=True)
    if inner is None and ratio != 4:
        inner = 256 * -(-int(width * ratio * 2 / 3) // 256)
    expand = fields.number("expand_ratio", float, optional=True) or 1
    if expand != 1 and fields.flag("use_lower_bound"):
        raise fields.refuse(
            "expand_ratio",
            "not defined together with use_lower_bound, whose bounds have one channel for each "
            "of hidden_size",
        )
    return ModelConfig(
        mixer="mlgru",
        vocab_size=fields.number("vocab_size"),
        hidden_size=width,
        num_layers=fields.number("num_hidden_layers"),
        intermediate_size=inner,
        mixer_linear=BITLINEAR,
        glu_linear=BITLINEAR,
        head_linear=BITLINEAR,
        use_lower_bound=fields.flag("use_lower_bound"),
        expand_ratio=expand,
        short_conv=fields.number("conv_size") if fields.flag("use_short_conv") else 0,
        share_short_conv=fields.flag("share_conv_kernel"),
        norm_eps=fields.number("rms_norm_eps", float),
        linear_norm_eps=fields.number("linear_norm_eps", float),
        initializer_range=fields.number("initializer_range", float),
        compute_dtype="float32",
        residual_dtype="float32",
    )


def write_config(
    config: ModelConfig,
    *,
    dtype: str,
    packed: bool = False,
    max_length: int = 2048,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """The fields of config.json for one of our models.

    Args:
      config: of the model.
      dtype: of the stored weights.
      packed: the ternary ones are stored at 2 bits.
      max_length: of the rows that it was trained on (tokens).
      bos_id: start-of-text token id.
      eos_ids: end-of-text token ids; one is written as a number.

    Raises:
      ConfigError: no Hugging Face architecture computes this model; the message says why.
    """
    groups = {config.mixer_linear, config.glu_linear, config.head_linear}
    common = {
        "bos_token_id": bos_id,
        "eos_token_id": list(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), None),
        "pad_token_id": None,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": max_length,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    ratio = config.expand_ratio
    if config.unreleased:
        raise ConfigError(
            f"{' and '.join(config.unreleased)}: {HGRN_BIT} folders, and those of Transformers, "
            "hold the released models' layers alone"
        )
    if config.mixer == "mlgru" and groups == {BITLINEAR}:
        fields = common | {
            "architectures": [f"HGRNBit{'Packed' if packed else ''}ForCausalLM"],
            "auto_map": auto_map(packed=packed),
            "attn_mode": "fused_recurrent",
            "conv_size": config.short_conv or 4,
            "expand_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "fuse_cross_entropy": False,
            "hidden_act": "swish",
            "hidden_ratio": 4,
            "intermediate_size": config.intermediate_size,
            "model_type": HGRN_BIT_PACKED if packed else HGRN_BIT,
            "num_heads": 1,
            "share_conv_kernel": config.share_short_conv,
            "use_lower_bound": config.use_lower_bound,
            "use_short_conv": config.short_conv > 0,
        }
        if config.linear_norm_eps != 1e-6:
            fields["linear_norm_eps"] = config.linear_norm_eps
    elif config.mixer == "attention" and groups == {DENSE} and not config.ternary_qk:
        fields = common | huggingface_llama.write(config)
    else:
        raise ConfigError(
            f"the model is a hybrid (mixer {config.mixer!r}; mixer_linear, glu_linear and "
            "head_linear not all BitLinear or all dense, or ternary_qk): Hugging Face folders hold "
            f"only {HGRN_BIT} (MLGRU, all BitLinear) and {', '.join(huggingface_llama.DEFAULTS)} "
            "(attention, all dense) models"
        )
    return dict(sorted(fields.items()))

"""The fields of a config.json: those that are read, and the others, harmless or refused by name.

A field changes what a model computes, or it does not. Those of the second kind are listed here;
any other that is not read is an error, so that none is dropped in silence.
"""

import math
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.readable import brief

# Names, versions, training, and how a program runs: the same logits whatever they say.
_HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_from_model_config",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "name_or_path",
    "neftune_noise_alpha",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "residual_dropout",
    "bos_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "mask_token_id",
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
}
# Defaults of `generate` in older folders; ours come from its arguments.
_GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
# Harmless with these values only; each is off or what the model computes anyway.
_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "attention_qkv_bias": (False,),
    "attn_bias": (False,),
    "bias": (False,),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
    "qkv_bias": (False,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "rotary_pct": (1, 1.0),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_bias": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


def check_unread(file: Path, raw: dict[str, Any], read: set[str]) -> None:
    """Refuses a field that is neither read nor known to be harmless; null counts as left out.

    Args:
      file: config.json, for the message.
      raw: its fields.
      read: names that the reader understands.

    Raises:
      ConfigError: names the field, its value and the way out.
    """
    for name, value in raw.items():
        if name in read or name in _HARMLESS or name in _GENERATION or value is None:
            continue
        if name == "layer_types":
            allowed = isinstance(value, list) and all(v == "full_attention" for v in value)
        else:
            same = (type(v) is type(value) and v == value for v in _OFF.get(name, ()))
            allowed = any(same)
        if allowed:
            continue
        if name in _OFF or name == "layer_types":
            raise ConfigError(f"{file}: {name} is {value!r}, which is not supported: {_WAY_OUT}")
        raise ConfigError(
            f"{file}: {name} is {value!r}, a field that is not known here and may change what the "
            f"model computes: remove it from a copy of the file if it does not, else {_WAY_OUT}"
        )


_WAY_OUT = "use a model without it"


class Fields:
    """The fields of a config.json, with defaults; errors name the file and the field."""

    def __init__(self, file: Path, raw: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.file, self.raw, self.defaults = file, raw, defaults

    def __getitem__(self, name: str) -> Any:
        return self.raw.get(name, self.defaults.get(name))

    def refuse(self, name: str, why: str) -> ConfigError:
        """The error that names a field and its value."""
        return ConfigError(f"{self.file}: {name} is {brief(self[name])}: {why}")

    def require(self, names: tuple[str, ...], allowed: tuple[Any, ...]) -> None:
        """Refuses fields with other values than the allowed ones."""
        for name in names:
            if self[name] not in allowed:
                shown = " or ".join(map(repr, allowed))
                raise self.refuse(name, f"not supported, only {shown}")

    def flag(self, name: str) -> bool:
        """A field that is true or false; null is false."""
        value = self[name]
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false is needed")
        return bool(value)

    def number(self, name: str, kind: type = int, *, optional: bool = False) -> Any:
        """A field that is a finite number above 0, as `kind`; None only where `optional`."""
        value = self[name]
        if value is None and optional:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise self.refuse(name, "a number above 0 is needed")
        if kind is int and value != int(value):
            raise self.refuse(name, "a whole number is needed")
        return kind(value)

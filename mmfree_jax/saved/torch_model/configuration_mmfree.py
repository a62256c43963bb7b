"""Configuration of MatMul-free language models (arXiv 2406.02528) for transformers.

Written by `mmfree export-hf` beside a model's weights. Fields and names are those of the paper's
authors, whose package reads the same folder. Apache-2.0.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class HGRNBitConfig(PretrainedConfig):
    """What a MatMul-free language model computes.

    Args:
      vocab_size: rows of the embedding and of the head (tokens).
      hidden_size: width of the residual stream (channels).
      num_hidden_layers: blocks.
      attn_mode: the authors' choice of kernel; all compute the same, and it is not read here.
      num_heads: of no effect: the recurrence and the gate's norm act on each channel alone.
      expand_ratio: channels of the recurrent state for each of the stream.
      use_short_conv: causal convolutions before the recurrence.
      conv_size: their length (tokens).
      share_conv_kernel: one on the mixer's input; False: one each on its inputs i and f.
      use_lower_bound: bound each layer's forget gate from below, the deeper the more tightly.
      hidden_ratio: gives the width of the GLU where `intermediate_size` is None.
      intermediate_size: width of the GLU (channels).
      hidden_act: "swish" or "silu", one function.
      max_position_embeddings: length of the rows in training (tokens); no limit.
      rms_norm_eps: of the norms outside the linear layers.
      linear_norm_eps: of the norm in each linear layer; None: 1e-6.
      initializer_range: standard deviation at initialisation.
      use_cache: return the recurrent state unless told otherwise.
      tie_word_embeddings: the head's matrix is the embedding's.
      pad_token_id, bos_token_id, eos_token_id: as everywhere in transformers.
      kwargs: of `PretrainedConfig`.
    """

    model_type = "hgrn_bit"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    # Whether the linear layers' weights are stored at 2 bits.
    packed = False

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        attn_mode: str = "fused_recurrent",
        num_heads: int | None = 1,
        expand_ratio: float | None = 1,
        use_short_conv: bool = False,
        conv_size: int = 4,
        share_conv_kernel: bool = True,
        use_lower_bound: bool = True,
        hidden_ratio: float | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        linear_norm_eps: float | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ) -> None:
        if hidden_act not in ("swish", "silu"):
            raise ValueError(f"hidden_act is {hidden_act!r}: only swish (silu) is implemented")
        if use_lower_bound and expand_ratio not in (None, 1):
            raise ValueError(
                f"expand_ratio is {expand_ratio}: not defined together with use_lower_bound"
            )
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config is set: the weights are ternary already, and a quantiser "
                "would drop the norm inside each linear layer; load without it"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.attn_mode = attn_mode
        self.num_heads = num_heads
        self.expand_ratio = expand_ratio
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.share_conv_kernel = share_conv_kernel
        self.use_lower_bound = use_lower_bound
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        if linear_norm_eps is not None:
            self.linear_norm_eps = linear_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def state_size(self) -> int:
        """Channels of the recurrent state."""
        return int(self.hidden_size * (self.expand_ratio or 1))

    @property
    def glu_size(self) -> int:
        """Width of the GLU (channels)."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256)


class HGRNBitPackedConfig(HGRNBitConfig):
    """The same with weights at 2 bits.

    A type of its own, so that no other program takes the folder for one with float weights.
    """

    model_type = "hgrn_bit_packed"
    packed = True

    # Without one of its own, newer transformers make a dataclass of it.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

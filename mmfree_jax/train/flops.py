"""Parameters and floating-point operations of a model, counted exactly from its config.

`jax`'s own `cost_analysis` counts the body of a scan over layers once, so nothing here is
measured. Conventions: a multiply-add is two operations; what a backward pass recomputes
(remat, fused layers) is not counted, so that the figures are the model's and not the
program's; int8 and ternary products count as the bfloat16 products they stand for.
"""

import dataclasses
from collections.abc import Iterator

from mmfree_jax.mixer_pattern import BOUNDED
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model_config import LinearConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by component."""

    embedding: int
    mixer: int
    """Matrices of the token mixer, their biases, its short convolutions, the lower bounds of its
    forget gates, and its other vectors."""
    glu: int
    head: int
    norms: int
    ternary: int
    """Those among the matrices that are rounded to {-1, 0, +1}."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.mixer + self.glu + self.head + self.norms

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the head: the N of scaling laws."""
        return self.mixer + self.glu + self.norms


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of the model by component, as `LanguageModel.init` makes them.

    Example:
      >>> from mmfree_jax import preset
      >>> from mmfree_jax.train import count_parameters
      >>> counted = count_parameters(preset("370M").model)
      >>> counted.total, counted.ternary
      (374108160, 341049344)
    """
    d, m, layers, vocab = (
        config.hidden_size,
        config.glu_size,
        config.num_layers,
        config.vocab_size,
    )
    glu, head, norms = layers * 3 * d * m, vocab * d, layers * 2 * d + d
    mixer = vectors = ternary_mixer = 0
    for name in config.layer_mixers:
        of_mixer, matrices = mixer_of(name), _matrix_weights(config, name)
        mixer, vectors = mixer + matrices, vectors + of_mixer.vectors(config)
        norms += of_mixer.norms(config)
        if config.linear_of(name).input_norm:
            norms += sum(columns for _, columns in of_mixer.matrices(config).values())
        if config.linear_of(name).ternary_weights:
            ternary_mixer += matrices
    if config.glu_linear.input_norm:
        norms += layers * (d + m)
    if config.head_linear.input_norm:
        norms += d

    learnt = config.weight_scale == "learned"
    if learnt:  # a scale a ternary matrix
        mixer += sum(
            len(mixer_of(name).matrices(config))
            for name in config.layer_mixers
            if config.linear_of(name).ternary_weights
        )
        glu += 2 * layers * config.glu_linear.ternary_weights
        head += config.head_linear.ternary_weights

    def ternary(group: LinearConfig, size: int) -> int:
        return size if group.ternary_weights else 0

    return Parameters(
        embedding=vocab * d,
        mixer=mixer + vectors,
        glu=glu,
        head=head,
        norms=norms,
        ternary=ternary_mixer
        + ternary(config.glu_linear, layers * 3 * d * m)
        + ternary(config.head_linear, vocab * d),
    )


def mixer_weights(config: ModelConfig) -> int:
    """Weights of the token mixers of all layers: their matrices."""
    return sum(_matrix_weights(config, name) for name in config.layer_mixers)


def _matrix_weights(config: ModelConfig, name: str) -> int:
    """Of one layer."""
    return sum(rows * columns for rows, columns in mixer_of(name).matrices(config).values())


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one forward pass for one token."""

    mixer: int
    """Projections of the token mixer."""
    mixing: float
    """Between tokens: attention's scores and sums (mean over a causal row), or the element-wise
    operations of other mixers."""
    glu: int
    head: int

    @property
    def forward(self) -> float:
        """Forward pass; norms, biases, activations of the GLU and quantisation are left out."""
        return self.mixer + self.mixing + self.glu + self.head

    @property
    def training(self) -> float:
        """Forward and backward: each product has two in the backward pass."""
        return 3 * self.forward


def mixing_flops(config: ModelConfig, seq_len: int) -> Iterator[float]:
    """Operations a token of each layer's mixing of tokens, in their order; as in `count_flops`."""
    bounded = 0
    for name in config.layer_mixers:
        yield mixer_of(name).mixing_flops(config, seq_len, bounded)
        bounded += name in BOUNDED


def count_flops(config: ModelConfig, seq_len: int) -> TokenFlops:
    """Operations a token of the forward pass, averaged over a row of `seq_len` tokens.

    Attention is counted as causal. Rows that pack several documents do less.

    Example:
      >>> from mmfree_jax import preset
      >>> from mmfree_jax.train import count_flops
      >>> f"{count_flops(preset('370M').model, seq_len=2048).training:.3e}"  # a token
      '2.047e+09'
    """
    d, layers = config.hidden_size, config.num_layers
    return TokenFlops(
        mixer=2 * mixer_weights(config),
        mixing=sum(mixing_flops(config, seq_len), 0.0),
        glu=2 * layers * 3 * d * config.glu_size,
        head=2 * d * config.vocab_size,
    )


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device's data sheet says."""

    name: str
    bf16_flops: float
    """Dense bfloat16 (V100, T4: float16) matrix products, operations a second."""
    memory_gib: float
    memory_bandwidth: float
    """Of the device's own memory, bytes a second."""
    int8_over_bf16: float = 2.0
    """Dense int8 operations for each bfloat16 one."""

    @property
    def int8_ops(self) -> float:
        """Dense int8 matrix products, operations a second."""
        return self.bf16_flops * self.int8_over_bf16


# Searched in order; the first whose key is part of the lower-cased `device_kind` is taken.
# A JAX device of TPU v4 and later is a whole chip; of v2 and v3, one of its two cores.
_DEVICES = (
    ("gh200", Device("GH200", 989.4e12, 96, 4.0e12)),
    ("gb200", Device("GB200", 2500e12, 186, 8.0e12)),
    ("b200", Device("B200", 2250e12, 180, 8.0e12)),
    ("h200", Device("H200", 989.4e12, 141, 4.8e12)),
    ("h100 pcie", Device("H100 PCIe", 756e12, 80, 2.0e12)),
    ("h100 nvl", Device("H100 NVL", 835.5e12, 94, 3.9e12)),
    ("h100", Device("H100 SXM", 989.4e12, 80, 3.35e12)),
    ("h800", Device("H800", 989.4e12, 80, 3.35e12)),
    ("a100-sxm4-40gb", Device("A100 40GB", 312e12, 40, 1.555e12)),
    ("a100-pcie-40gb", Device("A100 40GB", 312e12, 40, 1.555e12)),
    ("a100", Device("A100", 312e12, 80, 2.039e12)),
    ("a800", Device("A800", 312e12, 80, 2.039e12)),
    ("l40s", Device("L40S", 362e12, 48, 864e9)),
    ("a10g", Device("A10G", 70e12, 24, 600e9)),
    ("v100", Device("V100", 125e12, 32, 900e9, 0.5)),
    ("rtx 4090", Device("RTX 4090", 165.2e12, 24, 1.008e12)),
    ("rtx 3090", Device("RTX 3090", 71e12, 24, 936e9)),
    ("tesla t4", Device("T4", 65e12, 16, 320e9)),
    ("tpu v6", Device("TPU v6e", 918e12, 32, 1.64e12)),
    ("tpu v5 lite", Device("TPU v5e", 197e12, 16, 819e9)),
    ("tpu v5e", Device("TPU v5e", 197e12, 16, 819e9)),
    ("tpu v5", Device("TPU v5p", 459e12, 95, 2.765e12)),
    ("tpu v4", Device("TPU v4", 275e12, 32, 1.228e12, 1.0)),
    ("tpu v3", Device("TPU v3", 61.5e12, 16, 450e9, 1.0)),
    ("tpu v2", Device("TPU v2", 22.5e12, 8, 350e9, 1.0)),
)


def find_device(kind: str) -> Device | None:
    """The data sheet of a JAX `device_kind`; None when it is not in the table."""
    kind = kind.lower()
    return next((device for key, device in _DEVICES if key in kind), None)


def utilisation(
    config: ModelConfig, seq_len: int, tokens_per_second: float, kind: str, devices: int
) -> float | None:
    """Model FLOPs utilisation: training operations done over those the devices could do.

    The denominator is the data sheet's dense bfloat16 rate also where products run in int8.
    None when the device is not in the table.
    """
    device = find_device(kind)
    if device is None:
        return None
    done = count_flops(config, seq_len).training * tokens_per_second
    return done / (device.bf16_flops * devices)

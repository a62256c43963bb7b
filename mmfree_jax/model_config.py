"""What a model is: its sizes, its kinds of layer, and how it is initialised and run."""

import math
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.mixer_pattern import BOUNDED, is_own, pattern_text, period_of
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, Layers, check_numbers, require
from mmfree_jax.rope_scaling import UNSCALED, RopeScaling

Dtype = Literal["float32", "bfloat16", "float16"]
MatmulKernel = Literal[
    "xla_int8", "xla_bf16", "xla_f32", "pallas_mosaic_gpu", "pallas_triton", "pallas_tpu"
]
RecurrenceKernel = Literal["xla", "pallas_gpu", "pallas_tpu"]
AttentionKernel = Literal["xla", "cudnn"]
OutputGate = Literal["authors", "text", "figure", "none"]
Candidate = Literal["silu", "linear", "tanh"]
GLUActivation = Literal["silu", "relu2"]
WeightScale = Literal["matrix", "groups", "learned"]
GROUP = 128
"""Inputs that share a scale with weight_scale "groups"."""


@dataclass(frozen=True)
class LinearConfig:
    """What one group of linear layers computes; all three on is a BitLinear."""

    ternary_weights: bool = True
    """Round weights to {-1, 0, +1} times one scale a matrix."""
    int8_activations: bool = True
    """Round each token's input to int8 by its largest magnitude."""
    input_norm: bool = True
    """Apply an RMSNorm of the layer's own to its input."""


BITLINEAR = LinearConfig()
DENSE = LinearConfig(ternary_weights=False, int8_activations=False, input_norm=False)


@dataclass(frozen=True)
class ModelConfig:
    """A language model: MatMul-free (`mixer="mlgru"`), Transformer++ (`"attention"`), or another.

    docs/models.md has what they compute.
    """

    mixer: str = "mlgru"
    """Token mixer. mlgru: the MatMul-free gated linear recurrence; attention: causal, with RoPE;
    rwkv4: the paper's other one, an average of values that fades with a learnt decay; mingru:
    minGRU; rglru: Griffin's RG-LRU; hgrn2: HGRN2, whose state is a matrix a head;
    MODULE:NAME: your own (docs/adding-a-mixer.md). Or a pattern of layers that repeats over the
    depth: mlgru:3,attention is three of the one and then one of the other."""
    vocab_size: Count = 32_000
    """Rows of the embedding and of the head (tokens). Where neither a flag nor a config file nor a
    preset other than a rung says it, commands take the vocabulary of data.paths."""
    hidden_size: Count = 1024
    """Width of the residual stream (channels)."""
    num_layers: Layers = 24
    """Number of blocks; each is a mixer and a GLU."""
    intermediate_size: Count | None = None
    """Width of the GLU (channels); None: 256 * ceil(int(hidden_size * 8/3) / 256)."""
    num_heads: Count | None = None
    """Attention heads; None: hidden_size / 64, at least 1. MLGRU has no heads."""
    num_kv_heads: Count | None = None
    """Attention heads of keys and values, shared by groups of queries; None: num_heads."""
    head_dim: Count | None = None
    """Width of an attention head (channels); None: hidden_size / num_heads."""
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    """Projections of attention that add a bias. qkv: those of queries, keys and values; qkvo: the
    output's too."""
    qk_norm: bool = False
    """Attention: an RMSNorm over each head's queries and keys, before their positions."""
    ternary_qk: bool = False
    """Attention: round queries and keys, after their positions, to {-1, 0, +1} times one scale a
    token and head, so that the scores need no products either: with ternary layers the paper's
    Transformer++ that did not converge (docs/models.md)."""
    expand_ratio: AboveZero = 1.0
    """Channels of the recurrent state for each of the residual stream."""
    state_expansion: Count | None = None
    """HGRN2: channels of a head, and how many numbers its state holds for each of them; None: 128,
    or what it and the state's channels have as greatest common divisor."""
    short_conv: CountOrZero = 0
    """MLGRU: length of a causal convolution over each channel (tokens); 0: none."""
    share_short_conv: bool = True
    """Where it acts: once on the mixer's input; off: on the i and f projections' outputs."""
    output_gate: OutputGate = "authors"
    """MLGRU: what of its state h and its gate g goes into the output projection. authors:
    RMSNorm(g) silu(h), as their code and the released models; text: g sigmoid(h), as the paper
    writes; figure: h sigmoid(g), as it draws; none: h alone, without g (docs/models.md)."""
    candidate: Candidate = "silu"
    """MLGRU: what its candidate makes of the projection i. silu: the paper's; linear: nothing;
    tanh: as a GRU does."""
    rope_theta: AboveZero = 10_000.0
    """Base of the rotary position angles (attention only)."""
    rope_scaling: RopeScaling = UNSCALED
    """Stretching of these angles for longer rows (attention only)."""
    mixer_linear: LinearConfig = BITLINEAR
    """The mixer's projections."""
    float_attention: bool = False
    """Patterns: projections of attention layers in float, without a norm of their own, whatever
    mixer_linear makes of the other layers'."""
    glu_linear: LinearConfig = BITLINEAR
    """The GLU's projections."""
    glu_activation: GLUActivation = "silu"
    """What the GLU's gate goes through. silu: the paper's and LLaMA's; relu2: the square of ReLU,
    as in BitNet b1.58 2B4T (docs/models.md)."""
    head_linear: LinearConfig = BITLINEAR
    """The projection onto the vocabulary."""
    weight_scale: WeightScale = "matrix"
    """Scale of ternary weights. matrix: one a matrix, its mean magnitude; groups: one for each 128
    inputs of each output, theirs; learned: one a matrix, a learnt multiple of its mean magnitude
    (docs/models.md)."""
    use_lower_bound: bool = True
    """MLGRU and HGRN2: bound each layer's forget gate from below, more tightly the deeper it is."""
    norm_eps: AboveZero = 1e-6
    """Added to the mean square in the block, gate and final RMSNorms."""
    linear_norm_eps: AboveZero = 1e-6
    """The same in a BitLinear's own RMSNorm (1e-8 in the authors' unfused code)."""
    initializer_range: AboveZero = 0.02
    """Standard deviation of the embedding, GLU and head at initialisation."""
    mup: bool = False
    """Maximal update parametrisation: initial sizes and learning rates follow from the width, so
    that the best rate of one width is about that of others (docs/mup.md)."""
    mup_base_width: Count = 256
    """Width at which mup changes nothing: where the rate was tuned (channels)."""
    param_dtype: Dtype = "float32"
    """Dtype of the master weights."""
    compute_dtype: Dtype = "bfloat16"
    """Dtype of activations between operations; norms, recurrence carry and loss are float32."""
    residual_dtype: Dtype = "bfloat16"
    """Dtype of the residual stream between blocks."""
    bitlinear: Literal["fused", "plain"] = "fused"
    """BitLinear's program: fused keeps only its input for the backward pass and recomputes
    the rest; plain is the textbook straight-through composition, for comparison."""
    backward: Literal["bf16", "int8_dx", "int8"] = "bf16"
    """Operands of the fused BitLinears' backward products. bf16: the compute dtype; int8_dx: the
    incoming gradient in int8 for the inputs' gradient; int8: for the weights' gradient too, which
    learnt a little worse (docs/kernels.md). The head's stay in the compute dtype."""
    matmul_kernel: MatmulKernel | None = None
    """Implementation of the ternary product; None: the fastest known here."""
    recurrence_kernel: RecurrenceKernel | None = None
    """Implementation of the recurrence; None: the fastest known here."""
    attention_kernel: AttentionKernel | None = None
    """Implementation of causal attention; None: the fastest known here."""
    remat: Literal["none", "full", "stream", "states", "gated", "gates", "projections", "dots"] = (
        "full"
    )
    """What the backward pass recomputes. none: nothing; full: whole blocks, from their input;
    stream: keeps the residual stream between mixer and GLU too; states: also the recurrent
    state; gated: and its output gate g; gates: and i and f; projections: keeps the stream and the
    products that read it; dots: all but the matrix products."""
    scan_layers: bool = True
    """Compile one block and loop over layers; off: unroll them, which takes longer to compile but
    less time and memory to run, as nothing is copied into and out of stacks of all layers."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.")
        # One text for one model: runs, sessions and sweeps compare it.
        object.__setattr__(self, "mixer", pattern_text(period_of(self.mixer)))
        length, attends = len(period_of(self.mixer)), "attention" in self.period
        require(
            self.num_layers >= length,
            "model.num_layers",
            self.num_layers,
            f"mixer {self.mixer} has {length} layers; set as many or more",
        )
        # With attention alone short_conv is taken and has no effect.
        shared = {"short_conv": 0} if self.mixer != "attention" else {}
        for name, default in (_OF_MLGRU | shared).items():
            value = getattr(self, name)
            require(
                "mlgru" in self.period or value == default,
                f"model.{name}",
                value,
                f"it is the MLGRU's; leave it out ({default}) with mixer {self.mixer}",
            )
        require(
            not self.ternary_qk or attends,
            "model.ternary_qk",
            self.ternary_qk,
            f"mixer {self.mixer} has no queries and keys; set --model.mixer attention, or "
            "--model.no-ternary-qk",
        )
        require(
            not self.float_attention or (attends and length > 1),
            "model.float_attention",
            self.float_attention,
            f"mixer {self.mixer} is no pattern with attention; set --model.no-float-attention, and "
            "mixer_linear where all layers attend",
        )
        require(
            self.expand_ratio == 1 or not self.bounded_layers or not self.use_lower_bound,
            "model.expand_ratio",
            self.expand_ratio,
            "set --model.no-use-lower-bound: the bounds have one channel for each of hidden_size",
        )
        require(
            self.state_expansion is None or "hgrn2" in self.period,
            "model.state_expansion",
            self.state_expansion,
            f"it is HGRN2's; leave it out with mixer {self.mixer}",
        )
        require(
            self.state_size % self.head_expansion == 0,
            "model.state_expansion",
            self.state_expansion,
            f"set --model.state-expansion to a divisor of the state's channels ({self.state_size})",
        )
        if attends:
            heads = self.attention_heads
            require(
                self.head_dim is not None or self.hidden_size % (2 * heads) == 0,
                "model.num_heads",
                heads,
                f"set --model.num-heads to a divisor of half of hidden_size ({self.hidden_size}), "
                "or --model.head-dim",
            )
            require(
                self.head_channels % 2 == 0,
                "model.head_dim",
                self.head_dim,
                "set --model.head-dim to an even number: positions rotate its halves",
            )
            kv_heads = self.kv_heads
            require(
                heads % kv_heads == 0,
                "model.num_kv_heads",
                kv_heads,
                f"set --model.num-kv-heads to a divisor of num_heads ({heads})",
            )
        if self.weight_scale != "matrix":
            require(
                any(linear.ternary_weights for linear in self._linears),
                "model.weight_scale",
                self.weight_scale,
                "no layer is ternary; set --model.weight-scale matrix",
            )
        if self.weight_scale == "groups":
            self._check_groups()

    def _check_groups(self) -> None:
        """Refuses what needs one scale a matrix, and widths that are no whole groups."""
        kernels = ("pallas_mosaic_gpu", "pallas_triton", "pallas_tpu")
        for name, refused, instead in (
            ("backward", ("int8_dx", "int8"), "bf16"),
            ("matmul_kernel", kernels, "xla_int8"),
        ):
            value = getattr(self, name)
            require(
                value not in refused,
                "model.weight_scale",
                self.weight_scale,
                f"{name} {value} needs one scale a matrix; set --model.{name.replace('_', '-')} "
                f"{instead}, or --model.weight-scale matrix",
            )
        widths = {"hidden_size": self.hidden_size}
        if self.glu_linear.ternary_weights:
            widths["intermediate_size"] = self.glu_size
        if self.mixer_linear.ternary_weights and self.period != ("attention",):
            widths["expand_ratio * hidden_size"] = self.state_size
        if "attention" in self.period and self.linear_of("attention").ternary_weights:
            widths["num_heads * head_dim"] = self.query_size
        for name, size in widths.items():
            require(
                size % GROUP == 0,
                "model.weight_scale",
                self.weight_scale,
                f"{name} is {size}; set a multiple of {GROUP}, or --model.weight-scale matrix",
            )

    @property
    def _linears(self) -> tuple[LinearConfig, ...]:
        return self.mixer_linear, self.glu_linear, self.head_linear

    @property
    def period(self) -> tuple[str, ...]:
        """Token mixers of the layers that repeat over the depth; one where all are alike.

        Where a pattern does not fill the depth a whole number of times, these are all layers.
        """
        period = period_of(self.mixer)
        return period if self.num_layers % len(period) == 0 else self.layer_mixers

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The token mixer of each layer."""
        period = period_of(self.mixer)
        return (period * -(-self.num_layers // len(period)))[: self.num_layers]

    def linear_of(self, mixer: str) -> LinearConfig:
        """What the projections of this mixer's layers compute."""
        return DENSE if mixer == "attention" and self.float_attention else self.mixer_linear

    @property
    def glu_size(self) -> int:
        """Width of the GLU (channels)."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * 4 * 2 / 3) // 256)

    @property
    def attention_heads(self) -> int:
        """Number of attention heads."""
        return self.num_heads if self.num_heads is not None else max(1, self.hidden_size // 64)

    @property
    def kv_heads(self) -> int:
        """Number of attention heads of keys and values."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.attention_heads

    @property
    def head_channels(self) -> int:
        """Width of an attention head (channels)."""
        default = self.hidden_size // self.attention_heads
        return self.head_dim if self.head_dim is not None else default

    @property
    def query_size(self) -> int:
        """Width of all queries of a token, and of what attention hands on (channels)."""
        return self.attention_heads * self.head_channels

    @property
    def key_size(self) -> int:
        """Width of all keys of a token, and of all values (channels)."""
        return self.kv_heads * self.head_channels

    @property
    def state_size(self) -> int:
        """Width of the recurrent state (channels)."""
        return int(self.hidden_size * self.expand_ratio)

    @property
    def head_expansion(self) -> int:
        """Channels of an HGRN2's head; its state has as many rows."""
        if self.state_expansion is not None:
            return self.state_expansion
        return math.gcd(self.state_size, 128)

    @property
    def state_heads(self) -> int:
        """Heads of an HGRN2."""
        return self.state_size // self.head_expansion

    @property
    def bounded_layers(self) -> int:
        """Layers whose forget gates have lower bounds, with `use_lower_bound` learnt ones."""
        return sum(name in BOUNDED for name in self.layer_mixers)

    @property
    def recurrent(self) -> bool:
        """Whether what is carried from token to token has a size of its own, and no cache in it."""
        return "attention" not in self.period

    @property
    def quantizes(self) -> bool:
        """Whether any weight or activation is rounded."""
        rounded = any(g.ternary_weights or g.int8_activations for g in self._linears)
        return rounded or self.ternary_qk

    @property
    def as_released(self) -> bool:
        """Whether mixer and GLU are those of the released models, and no other form of them."""
        return self.mixer == "mlgru" and not self.unreleased

    @property
    def unreleased(self) -> list[str]:
        """The settings by which layers have another form than the released models', with values."""
        values = {name: getattr(self, name) for name in _RELEASED}
        return [f"model.{n} is {v!r}" for n, v in values.items() if v != _RELEASED[n]]

    @property
    def family(self) -> str:
        """Name of the architecture, for tables: "matmulfree" (of the MLGRU; of other recurrent
        mixers "matmulfree-rwkv4" and the like, with HGRN2, whose states are read by products,
        "ternary-hgrn2", as with a user's own), "transformer" or "hybrid"."""
        if self.recurrent and set(self._linears) == {BITLINEAR}:
            products = "hgrn2" in self.period or any(map(is_own, self.period))
            kind = "ternary" if products else "matmulfree"
            return kind if self.mixer == "mlgru" else f"{kind}-{self.mixer}"
        if self.mixer == "attention" and set(self._linears) == {DENSE} and not self.ternary_qk:
            return "transformer"
        return "hybrid"


# Forms of the MLGRU that the released models do not have, with what they do have.
_OF_MLGRU = {"output_gate": "authors", "candidate": "silu"}

# The same of all their layers.
_RELEASED = {**_OF_MLGRU, "glu_activation": "silu", "weight_scale": "matrix"}

# How a model is initialised and run: the same weights compute the same function, up to rounding.
RUN_SETTINGS = (
    "initializer_range", "mup", "mup_base_width", "param_dtype", "compute_dtype", "residual_dtype",
    "bitlinear", "backward", "matmul_kernel", "recurrence_kernel", "attention_kernel", "remat",
    "scan_layers",
)  # fmt: skip

"""Every setting of a run, as frozen dataclasses that check themselves.

`TrainConfig` is the root; the command line, the YAML files and the resolved
`config.yaml` of a run directory are all derived from it. Derive a variant with
`dataclasses.replace`. The string under each field is its `--help` text.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mmfree_jax.errors import ConfigError
from mmfree_jax.places import Place
from mmfree_jax.ranges import (
    MOST,
    AboveZero,
    Count,
    CountOrZero,
    Layers,
    NotNegative,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    check_numbers,
)
from mmfree_jax.rope_scaling import UNSCALED, RopeScaling

Dtype = Literal["float32", "bfloat16", "float16"]
MatmulKernel = Literal[
    "xla_int8", "xla_bf16", "xla_f32", "pallas_mosaic_gpu", "pallas_triton", "pallas_tpu"
]
RecurrenceKernel = Literal["xla", "pallas_gpu", "pallas_tpu"]
AttentionKernel = Literal["xla", "cudnn"]


def _require(condition: bool, name: str, value: object, way_out: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}: {way_out}")


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
    """A language model: MatMul-free (`mixer="mlgru"`) or Transformer++ (`"attention"`)."""

    mixer: Literal["mlgru", "attention"] = "mlgru"
    """Token mixer: the MatMul-free gated linear recurrence, or causal attention with RoPE."""
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
    expand_ratio: AboveZero = 1.0
    """MLGRU: channels of the recurrent state for each of the residual stream."""
    short_conv: CountOrZero = 0
    """MLGRU: length of a causal convolution over each channel (tokens); 0: none."""
    share_short_conv: bool = True
    """Where it acts: once on the mixer's input; off: on the i and f projections' outputs."""
    rope_theta: AboveZero = 10_000.0
    """Base of the rotary position angles (attention only)."""
    rope_scaling: RopeScaling = UNSCALED
    """Stretching of these angles for longer rows (attention only)."""
    mixer_linear: LinearConfig = BITLINEAR
    """The mixer's projections."""
    glu_linear: LinearConfig = BITLINEAR
    """The GLU's projections."""
    head_linear: LinearConfig = BITLINEAR
    """The projection onto the vocabulary."""
    use_lower_bound: bool = True
    """MLGRU: bound each layer's forget gate from below, more tightly the deeper the layer."""
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
    remat: Literal["none", "full", "stream", "states", "gated", "gates", "dots"] = "full"
    """What the backward pass recomputes. none: nothing; full: whole blocks, from their input;
    stream: keeps the residual stream between mixer and GLU too; states: also the recurrent
    state; gated: and its output gate g; gates: and i and f; dots: all but the matrix products."""
    scan_layers: bool = True
    """Compile one block and loop over layers; off: unroll them, which takes longer to compile but
    less time and memory to run, as nothing is copied into and out of stacks of all layers."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.")
        _require(
            self.expand_ratio == 1 or self.mixer == "attention" or not self.use_lower_bound,
            "model.expand_ratio",
            self.expand_ratio,
            "set --model.no-use-lower-bound: the bounds have one channel for each of hidden_size",
        )
        if self.mixer == "attention":
            heads = self.attention_heads
            _require(
                self.head_dim is not None or self.hidden_size % (2 * heads) == 0,
                "model.num_heads",
                heads,
                f"set --model.num-heads to a divisor of half of hidden_size ({self.hidden_size}), "
                "or --model.head-dim",
            )
            _require(
                self.head_channels % 2 == 0,
                "model.head_dim",
                self.head_dim,
                "set --model.head-dim to an even number: positions rotate its halves",
            )
            kv_heads = self.kv_heads
            _require(
                heads % kv_heads == 0,
                "model.num_kv_heads",
                kv_heads,
                f"set --model.num-kv-heads to a divisor of num_heads ({heads})",
            )

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
        """Width of the MLGRU's recurrent state (channels)."""
        return int(self.hidden_size * self.expand_ratio)

    @property
    def family(self) -> str:
        """Name of the architecture, for tables: "matmulfree", "transformer" or "hybrid"."""
        groups = (self.mixer_linear, self.glu_linear, self.head_linear)
        if self.mixer == "mlgru" and all(g == BITLINEAR for g in groups):
            return "matmulfree"
        if self.mixer == "attention" and all(g == DENSE for g in groups):
            return "transformer"
        return "hybrid"


# How a model is initialised and run: the same weights compute the same function, up to rounding.
RUN_SETTINGS = (
    "initializer_range",
    "mup",
    "mup_base_width",
    "param_dtype",
    "compute_dtype",
    "residual_dtype",
    "bitlinear",
    "backward",
    "matmul_kernel",
    "recurrence_kernel",
    "attention_kernel",
    "remat",
    "scan_layers",
)


@dataclass(frozen=True)
class DataConfig:
    """Which prepared data sets to train on, and how rows are cut from them."""

    paths: tuple[Place, ...] = ()
    """Folders written by `mmfree data prepare`; all must share one tokenizer."""
    weights: tuple[AboveZero, ...] = ()
    """Share of rows drawn from each folder; empty: in proportion to their tokens."""
    seq_len: Count = 2048
    """Length of a training row (tokens)."""
    seed: Seed = 0
    """Seed of the global shuffle of rows."""
    prefetch: CountOrZero = 4
    """Batches prepared ahead of the device."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        if self.weights:
            _require(
                len(self.weights) == len(self.paths),
                "data.weights",
                self.weights,
                f"give --data.weights {len(self.paths)} numbers, one for each data.paths, or none",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its clipping and its learning-rate schedule."""

    learning_rate: AboveZero = 4e-3
    """Peak learning rate."""
    schedule: Literal["paper", "cosine", "wsd", "linear", "constant"] = "paper"
    """Shape after the warm-up. paper: cosine to zero, halved from the midpoint on;
    wsd: constant, then linear over the last decay_fraction."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up from zero."""
    decay_fraction: Share = 0.2
    """wsd: share of all steps spent decaying."""
    min_lr_ratio: Share = 0.0
    """Final learning rate as a share of the peak (paper always ends at zero)."""
    b1: ShareBelowOne = 0.9
    """Decay of the first moment."""
    b2: ShareBelowOne = 0.95
    """Decay of the second moment."""
    eps: AboveZero = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay, on weight matrices only (no norms, biases, bounds, embedding)."""
    clip_norm: AboveZero | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    moment_dtype: Dtype = "float32"
    """Dtype in which the first moment is kept."""
    gradient_dtype: Dtype = "float32"
    """Dtype in which devices exchange the gradients of matrices (bitlinear fused only): bfloat16
    halves the bytes. Each device's sum over its tokens, and all that follows the exchange (micro-
    batches, norm, clipping, update), is float32 in any case; one device exchanges nothing."""
    second_moment_dtype: Dtype = "float32"
    """Dtype in which the second moment is kept; bfloat16 needs b2 well below 0.99."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. The product of the axes is the number of devices."""

    data: Annotated[int, Range(-1, MOST)] = -1
    """Copies of the model, each on its own rows; -1: all devices that are left."""
    fsdp: Count = 1
    """Devices that share each copy's parameters and optimiser state, each on its own rows."""
    tensor: Count = 1
    """Devices that share each matrix product."""
    sequence: Count = 1
    """Devices that share each row, every one a stretch of its tokens (MLGRU only)."""

    def __post_init__(self) -> None:
        _require(
            self.data > 0 or self.data == -1,
            "mesh.data",
            self.data,
            "set --mesh.data -1, or a number above 0",
        )
        check_numbers(self, "mesh.")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: Count = 1000
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: AboveZero | None = None
    """Also save when this much time (minutes) has gone by since the last one."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_every: Count | None = None
    """Also keep every checkpoint whose step is a multiple of this, for good."""
    at_steps: tuple[Count, ...] = ()
    """Also save after these steps, and keep those checkpoints for good: to branch from."""
    resume: bool = True
    """Go on from the newest good checkpoint of the run directory, if it has one."""

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint.")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss and sample text during training."""

    every_steps: CountOrZero = 500
    """Steps between evaluations; 0: only at the end."""
    batches: CountOrZero = 16
    """Batches of held-out rows in one evaluation; 0: no evaluation."""
    sample_every_steps: CountOrZero = 0
    """Steps between sample texts; 0: only at the end."""
    sample_tokens: CountOrZero = 128
    """Length of a sample (tokens); 0: no samples."""
    sample_prompt: str = ""
    """Text that each sample continues."""
    sample_temperature: NotNegative = 0.8
    """Sampling temperature; 0: greedy."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval.")


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go. `metrics.jsonl` in the run directory is always written."""

    every_steps: Count = 10
    """Steps between records of the training metrics."""
    ternary_every_steps: CountOrZero = 100
    """Steps between records of the shares of zero and of changed ternary weights; 0: never."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (docs/tracking.md)."""
    wandb_group: str | None = None
    """Group of the run there; a sweep names its own after its folder."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """rich: one live line, on a terminal that can draw one; plain: lines; none: nothing; auto: as
    rich."""
    profile_steps: tuple[Count, Count] | None = None
    """First and last step of a jax.profiler trace, written to the run directory."""

    def __post_init__(self) -> None:
        check_numbers(self, "log.")
        first, last = self.profile_steps or (1, 1)
        _require(
            first <= last,
            "log.profile_steps",
            self.profile_steps,
            "give --log.profile-steps the first step first",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: Place = "runs/default"
    """Folder that receives the config, metrics, checkpoints and plots."""
    steps: Count = 1000
    """Optimiser steps in the whole run; schedules span them."""
    batch_size: Count = 8
    """Rows in one optimiser step, over all devices."""
    grad_accum: Count = 1
    """Micro-batches that one optimiser step is split into."""
    seed: Seed = 0
    """Seed of the initialisation."""
    z_loss: NotNegative = 0.0
    """Weight of the mean squared log-partition in the objective."""
    loss_chunk: Count = 2048
    """Tokens whose logits are held at once."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss or gradient is not finite: stop the run, or skip the update."""
    max_skips: CountOrZero = 10
    """skip: updates in a row that may be skipped before the run stops."""
    max_minutes: AboveZero | None = None
    """Stop early, with a checkpoint, after this much time (minutes)."""
    stop_at: Count | None = None
    """Stop early, with a checkpoint and an evaluation, after this step; schedules still span all
    steps, and the same command with another value, or none, goes on."""
    init_from: Place | None = None
    """Folder of a model whose weights to start from: a run, a model folder, Hugging Face. Weights
    alone: optimiser, step, schedule and position in the data begin anew."""
    branch_from: Place | None = None
    """RUN or RUN@STEP: a checkpoint of another run to go on from in run_dir, with its weights,
    optimiser, step, tokens and position in the data, under that run's settings but for those that
    are given. Steps count on from STEP (default: the newest), schedules span all of them."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_numbers(self)
        _require(bool(self.run_dir), "run_dir", self.run_dir, "give --run-dir a folder")
        _require(
            self.init_from is None or self.branch_from is None,
            "branch_from",
            self.branch_from,
            f"leave it out, or --init-from {self.init_from}, which takes weights alone",
        )
        _require(
            self.batch_size % self.grad_accum == 0,
            "grad_accum",
            self.grad_accum,
            f"set --grad-accum to a divisor of batch_size ({self.batch_size})",
        )
        _require(
            self.optimizer.warmup_steps < self.steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"set --optimizer.warmup-steps below steps ({self.steps})",
        )


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens in one optimiser step."""
    return config.batch_size * config.data.seq_len


def replace_model(config: TrainConfig, **changes: object) -> TrainConfig:
    """`config` with some fields of its model changed."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

"""Every setting of a run, as frozen dataclasses that check themselves.

`TrainConfig` is the root; the command line, the YAML files and the resolved
`config.yaml` of a run directory are all derived from it. Derive a variant with
`dataclasses.replace`. The string under each field is its `--help` text.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mmfree_jax.model_config import Dtype, ModelConfig
from mmfree_jax.places import Place, PlaceOrUrl
from mmfree_jax.quantizer_config import QuantizerConfig
from mmfree_jax.ranges import (
    MOST,
    AboveZero,
    Count,
    CountOrZero,
    NotNegative,
    PositiveShare,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    check_numbers,
    require,
)


@dataclass(frozen=True)
class DataConfig:
    """Which prepared data sets to train on, and how rows are cut from them."""

    paths: tuple[PlaceOrUrl, ...] = ()
    """Folders written by `mmfree data prepare`, or their URLs (gs://, s3://); all must share one
    tokenizer. mqar:pairs=N makes rows of a recall task as they are read (docs/evaluation.md)."""
    weights: tuple[AboveZero, ...] = ()
    """Share of rows drawn from each folder; empty: in proportion to their tokens."""
    seq_len: Count = 2048
    """Length of a training row (tokens)."""
    seed: Seed = 0
    """Seed of the global shuffle of rows."""
    prefetch: CountOrZero = 4
    """Batches prepared ahead of the device."""
    cache_gib: AboveZero = 100.0
    """Disk for copies of what lies in buckets (GiB); docs/data.md says where."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        if self.weights:
            require(
                len(self.weights) == len(self.paths),
                "data.weights",
                self.weights,
                f"give --data.weights {len(self.paths)} numbers, one for each data.paths, or none",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, its clipping and its learning-rate schedule."""

    name: Literal["adamw", "muon", "lion", "adafactor", "schedule_free"] = "adamw"
    """Which optimiser; all but adamw by optax. muon: for matrices, Adam for embedding, head and
    vectors; schedule_free: AdamW with an average of the weights in place of a schedule."""
    factory: str | None = None
    """MODULE:FUNCTION of your own in place of `name`: of (OptimizerConfig, ModelConfig) it makes
    an optax transformation whose result, times the rate, is subtracted, as scale_by_adam is."""
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
    second_stage_at: PositiveShare = 1.0
    """Share of all steps after which the rate is second_stage_rate of what the schedule says, as in
    BitNet b1.58's two stages (docs/recipes.md); 1: it never is."""
    second_stage_rate: PositiveShare = 0.5
    """Factor of the rate in the second stage."""
    b1: ShareBelowOne = 0.9
    """Decay of the first moment (muon, adafactor: momentum; schedule_free: the share of the average
    in the weights that gradients are taken at)."""
    b2: ShareBelowOne = 0.95
    """Decay of the second moment (lion: of its only one; adafactor has 1 - t^-0.8)."""
    eps: AboveZero = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay, on weight matrices only (no norms, biases, bounds, embedding)."""
    weight_decay_until: PositiveShare = 1.0
    """Share of all steps after which there is no weight decay (docs/recipes.md)."""
    clip_norm: AboveZero | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    moment_dtype: Dtype = "float32"
    """Dtype in which the first moment is kept."""
    gradient_dtype: Dtype = "float32"
    """Dtype in which devices exchange the gradients of matrices (bitlinear fused only): bfloat16
    halves the bytes. Each device's sum over its tokens, and all that follows the exchange (micro-
    batches, norm, clipping, update), is float32 in any case; one device exchanges nothing."""
    second_moment_dtype: Dtype = "float32"
    """Dtype in which the second moment is kept (adamw only); bfloat16 needs b2 well below 0.99."""
    embedding_rate: NotNegative = 1.0
    """Factor of the embedding's learning rate."""
    head_rate: NotNegative = 1.0
    """Factor of the head's."""
    matrix_rate: NotNegative = 1.0
    """Factor of that of the matrices in mixer and GLU."""
    vector_rate: NotNegative = 1.0
    """Factor of that of all else: norms' scales, bounds, biases, kernels of short convolutions."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")
        require(
            self.factory is None or re.fullmatch(r"[\w.]+:\w+", self.factory) is not None,
            "optimizer.factory",
            self.factory,
            "set --optimizer.factory MODULE:FUNCTION",
        )
        require(
            self.factory is None or self.name == "adamw",
            "optimizer.name",
            self.name,
            "leave it out, or leave out --optimizer.factory, which takes its place",
        )
        averages = self.name == "schedule_free"
        require(
            not averages or self.schedule == "constant",
            "optimizer.schedule",
            self.schedule,
            "set --optimizer.schedule constant for schedule_free, which averages in its place",
        )
        require(
            not averages or self.b1 > 0,
            "optimizer.b1",
            self.b1,
            "set --optimizer.b1 above 0 for schedule_free",
        )
        _check_stages(self)
        require(
            self.second_moment_dtype == "float32" or (self.name, self.factory) == ("adamw", None),
            "optimizer.second_moment_dtype",
            self.second_moment_dtype,
            "set --optimizer.second-moment-dtype float32: only adamw keeps it in another",
        )


def _check_stages(config: OptimizerConfig) -> None:
    """Refuses stages of the rate and of the decay that have nothing to change."""
    staged = config.second_stage_at < 1
    require(
        not staged or config.schedule != "paper",
        "optimizer.second_stage_at",
        config.second_stage_at,
        "leave it out: schedule paper halves the rate at the midpoint by itself; or set "
        "--optimizer.schedule cosine, linear, wsd or constant",
    )
    require(
        not staged or config.name != "schedule_free",
        "optimizer.second_stage_at",
        config.second_stage_at,
        "leave it out for schedule_free, which averages in place of a schedule",
    )
    require(
        config.weight_decay_until == 1 or config.weight_decay > 0,
        "optimizer.weight_decay_until",
        config.weight_decay_until,
        "leave it out, or set --optimizer.weight-decay above 0, for it to end",
    )


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
        require(
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
    keep_best: CountOrZero = 0
    """Also keep this many of the best by best_metric, and save at the step of one; 0: none."""
    best_metric: str = "eval_loss"
    """What is best: eval_loss, eval_bits_per_byte, eval_accuracy, of one source of a mixture with
    its name behind a slash (eval_loss/books), or a number of one of eval.tasks (piqa/acc)."""
    best_is: Literal["lowest", "highest"] | None = None
    """Whether the lowest or the highest value is best; None: as the metric has it. Of equal ones
    the earliest is kept; one that is not finite is never best."""
    local_dir: Place | None = None
    """Folder of each machine's own, on a disk or in memory (/dev/shm), for copies of the state that
    are saved more often than checkpoints; a run that goes on takes the newest of either."""
    local_every_steps: Count = 100
    """Steps between local copies, where there is checkpoint.local_dir."""
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
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks to score while training (docs/evaluation.md); empty: none."""
    tasks_dir: Place | None = None
    """Folder with the tasks' data or YAML files; None: where `mmfree eval fetch-tasks` puts it."""
    tasks_every_steps: CountOrZero = 0
    """Steps between scores of the tasks; 0: only at the end."""
    tasks_limit: Count | None = 200
    """First documents of each task only; None: all."""
    tasks_minutes: AboveZero = 10.0
    """Longest that one scoring of the tasks holds training up (minutes, and a batch): tasks that
    are not done by then are left out."""
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
        require(
            first <= last,
            "log.profile_steps",
            self.profile_steps,
            "give --log.profile-steps the first step first",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: PlaceOrUrl = "runs/default"
    """Folder that receives the config, metrics, checkpoints and plots, or its URL (gs://, s3://)."""
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
    init_from: PlaceOrUrl | None = None
    """Folder of a model, or its URL, whose weights to start from: a run, a model folder, Hugging
    Face. Weights alone: optimiser, step, schedule and position in the data begin anew."""
    branch_from: PlaceOrUrl | None = None
    """RUN or RUN@STEP: a checkpoint of another run, a folder or its URL, to go on from in run_dir,
    with its weights, optimiser, step, tokens and position in the data, under that run's settings
    but for those that are given. Steps count on from STEP (default: the newest), schedules span all
    of them."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_numbers(self)
        require(bool(self.run_dir), "run_dir", self.run_dir, "give --run-dir a folder")
        require(
            self.init_from is None or self.branch_from is None,
            "branch_from",
            self.branch_from,
            f"leave it out, or --init-from {self.init_from}, which takes weights alone",
        )
        require(
            self.batch_size % self.grad_accum == 0,
            "grad_accum",
            self.grad_accum,
            f"set --grad-accum to a divisor of batch_size ({self.batch_size})",
        )
        require(
            self.optimizer.warmup_steps < self.steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"set --optimizer.warmup-steps below steps ({self.steps})",
        )
        self._check_quantizer()

    def _check_quantizer(self) -> None:
        quantizer = self.quantizer
        name = "float_fraction" if quantizer.float_fraction else "warmup_fraction"
        require(
            quantizer.is_immediate or self.model.quantizes,
            f"quantizer.{name}",
            getattr(quantizer, name),
            "leave it out: the model rounds neither weights nor activations",
        )
        require(
            quantizer.ternary_from(self.steps) < self.steps,
            f"quantizer.{name}",
            getattr(quantizer, name),
            f"set it lower: of {self.steps} steps none is left to the ternary form",
        )


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens in one optimiser step."""
    return config.batch_size * config.data.seq_len


def replace_model(config: TrainConfig, **changes: object) -> TrainConfig:
    """`config` with some fields of its model changed."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

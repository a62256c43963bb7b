"""Settings that change nothing, because another setting leaves them nothing to act on.

Such a run is not wrong, and a config that is shared by several runs may well have them, so that
they are told, one line each, and not refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from mmfree_jax.config import TrainConfig
from mmfree_jax.model_config import ModelConfig


@dataclass(frozen=True)
class Idle:
    """Settings that say nothing under some others.

    Attributes:
      fields: their names, with dots.
      acts: whether they have something to act on.
      way_out: what would make them act.
    """

    fields: tuple[str, ...]
    acts: Callable[[TrainConfig], bool]
    way_out: str


def _attends(model: ModelConfig) -> bool:
    return "attention" in model.period


def _linears(model: ModelConfig) -> list[Any]:
    mixers = [model.linear_of(name) for name in model.period]
    return [*mixers, model.glu_linear, model.head_linear]


def _multiplies_int8(model: ModelConfig) -> bool:
    """Whether a block has products of trits and int8. Twins keep what their presets say of them."""
    blocks = _linears(model)[:-1]
    both = any(options.ternary_weights and options.int8_activations for options in blocks)
    return model.family == "transformer" or (both and model.bitlinear == "fused")


_ATTENTION = (
    "num_heads", "num_kv_heads", "head_dim", "attention_bias", "qk_norm", "rope_theta",
    "rope_scaling", "attention_kernel",
)  # fmt: skip

IDLE: tuple[Idle, ...] = (
    Idle(
        ("optimizer.second_stage_rate",),
        lambda c: c.optimizer.second_stage_at < 1,
        "set --optimizer.second-stage-at below 1",
    ),
    Idle(
        ("optimizer.second_stage_at",),
        lambda c: c.optimizer.second_stage_rate < 1,
        "set --optimizer.second-stage-rate below 1",
    ),
    Idle(
        ("optimizer.decay_fraction",),
        lambda c: c.optimizer.schedule == "wsd",
        "set --optimizer.schedule wsd",
    ),
    Idle(
        ("optimizer.min_lr_ratio",),
        lambda c: c.optimizer.schedule in ("cosine", "wsd", "linear"),
        "set --optimizer.schedule cosine, wsd or linear",
    ),
    Idle(
        ("optimizer.eps",),
        lambda c: c.optimizer.factory is not None or c.optimizer.name not in ("lion", "adafactor"),
        "set another --optimizer.name",
    ),
    Idle(
        ("optimizer.b2",),
        lambda c: c.optimizer.factory is not None or c.optimizer.name != "adafactor",
        "set another --optimizer.name",
    ),
    Idle(
        ("optimizer.moment_dtype",),
        lambda c: c.optimizer.factory is not None or c.optimizer.name != "schedule_free",
        "set another --optimizer.name",
    ),
    Idle(
        ("optimizer.gradient_dtype",),
        lambda c: c.model.bitlinear == "fused",
        "set --model.bitlinear fused",
    ),
    Idle(
        ("quantizer.float_fraction",),
        lambda c: c.quantizer.float_steps(c.steps) > 0,
        "set it or --steps higher, for it to be a step at least",
    ),
    Idle(
        ("quantizer.warmup_fraction",),
        lambda c: c.quantizer.ternary_from(c.steps) > c.quantizer.float_steps(c.steps),
        "set it or --steps higher, for it to be a step at least",
    ),
    Idle(
        ("checkpoint.best_metric", "checkpoint.best_is"),
        lambda c: c.checkpoint.keep_best > 0,
        "set --checkpoint.keep-best 1",
    ),
    Idle(
        ("checkpoint.local_every_steps",),
        lambda c: c.checkpoint.local_dir is not None,
        "set --checkpoint.local-dir",
    ),
    Idle(
        ("checkpoint.at_steps",),
        lambda c: any(step <= c.steps for step in c.checkpoint.at_steps),
        "name steps of the run",
    ),
    Idle(("eval.every_steps",), lambda c: c.eval.batches > 0, "set --eval.batches above 0"),
    Idle(
        ("eval.tasks_dir", "eval.tasks_every_steps", "eval.tasks_limit", "eval.tasks_minutes"),
        lambda c: bool(c.eval.tasks),
        "name tasks by --eval.tasks",
    ),
    Idle(
        ("eval.sample_every_steps", "eval.sample_prompt", "eval.sample_temperature"),
        lambda c: c.eval.sample_tokens > 0,
        "set --eval.sample-tokens above 0",
    ),
    Idle(
        ("log.wandb_group",), lambda c: c.log.wandb_project is not None, "set --log.wandb-project"
    ),
    Idle(("max_skips",), lambda c: c.on_nonfinite == "skip", "set --on-nonfinite skip"),
    Idle(("stop_at",), lambda c: (c.stop_at or 0) < c.steps, "set it below --steps"),
    Idle(
        tuple(f"model.{name}" for name in _ATTENTION),
        lambda c: _attends(c.model),
        "set a --model.mixer with attention",
    ),
    Idle(
        ("model.use_lower_bound",),
        lambda c: c.model.bounded_layers > 0,
        "set a --model.mixer with mlgru or hgrn2",
    ),
    Idle(
        ("model.share_short_conv",),
        lambda c: c.model.short_conv > 0,
        "set --model.short-conv above 0",
    ),
    Idle(
        ("model.short_conv",),
        lambda c: "mlgru" in c.model.period,
        "set a --model.mixer with mlgru",
    ),
    Idle(("model.mup_base_width",), lambda c: c.model.mup, "set --model.mup"),
    Idle(
        ("model.expand_ratio", "model.recurrence_kernel"),
        lambda c: c.model.period != ("attention",),
        "set another --model.mixer",
    ),
    Idle(
        ("model.linear_norm_eps",),
        lambda c: any(options.input_norm for options in _linears(c.model)),
        "set --model.mixer-linear.input-norm, or that of another kind of layer",
    ),
    Idle(
        ("model.backward", "model.matmul_kernel"),
        lambda c: _multiplies_int8(c.model),
        "set --model.bitlinear fused and layers with ternary weights and int8 activations",
    ),
    Idle(
        ("model.bitlinear",),
        lambda c: any(options.ternary_weights for options in _linears(c.model)),
        "set ternary weights in some linear layers",
    ),
)


def without_effect(config: TrainConfig) -> list[str]:
    """A line for each setting that differs from its default and changes nothing in this run."""
    default, lines = TrainConfig(), []
    for idle in IDLE:
        for name in idle.fields:
            value = attrgetter(name)(config)
            if name.startswith("model.") and (config.init_from or config.branch_from):
                continue  # The model is the source's, as it is.
            if value != attrgetter(name)(default) and not idle.acts(config):
                lines.append(
                    f"{name} is {value!r}, which changes nothing: {idle.way_out}, or leave it out"
                )
    return lines

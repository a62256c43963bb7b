"""What turns a gradient into the direction of a step: AdamW's rivals, by optax, and a user's own.

A transformation of `optax` whose result, times the learning rate, is subtracted, as `scale_by_adam`
is one. It gets gradients that are scaled and clipped already; the rate and its schedule, decoupled
weight decay and the factors of groups of parameters (`parameter_rules.py`) are the same for all.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.installed import load_own
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.parameter_rules import group_of

_MUON_RMS = 0.2
"""Of Muon's updates, as of AdamW's: rates and weight decays carry over (arXiv 2502.16982)."""


def make_direction(config: OptimizerConfig, model: ModelConfig | None) -> Any:
    """The transformation that `config` names; see the module.

    Args:
      config: of any optimiser but "adamw", which is one expression a weight (`adamw.py`).
      model: of the run, for a factory.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ConfigError: there is no such factory, or what it gives is no transformation.
    """
    if config.factory is not None:
        return _of_factory(config, model)
    return _BY_NAME[config.name](config)


def _muon(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Momentum made orthogonal, matrix by matrix; Adam for embedding, head and vectors.

    The head's rows are classes, as the embedding's are (Jordan, github.com/KellerJordan/Muon).
    """

    # Of [..., out, in]; layers are a batch.
    def axes(params: Any) -> Any:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-1, -2), params)

    muon = optax.chain(
        contrib.scale_by_muon(
            beta=config.b1,
            eps=config.eps,
            mu_dtype=config.moment_dtype,
            weight_dimension_numbers=axes,
        ),
        optax.stateless_with_tree_map(_with_rms),
    )
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype)
    return optax.partition({"muon": muon, "adam": adam}, _muon_or_adam)


def _with_rms(update: Any, _: Any) -> Any:
    """An orthogonal [..., out, in] scaled to AdamW's root mean square."""
    return update * (_MUON_RMS * math.sqrt(max(update.shape[-2:])))


def _muon_or_adam(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if group_of(path) == "matrix" else "adam", params
    )


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """The sign of a moment (Chen et al., arXiv 2302.06675)."""
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.moment_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """A second moment of rows and columns (Shazeer and Stern, arXiv 1804.04235).

    Its decay is their 1 - t^-0.8. Updates are bounded to a root mean square of 1 for each kind of
    parameter, all layers together, and get the momentum `b1` where that is not 0.
    """
    steps = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if config.b1:
        dtype = jax.numpy.dtype(config.moment_dtype)
        steps.append(optax.ema(config.b1, debias=False, accumulator_dtype=dtype))
    return optax.chain(*steps)


def _adam_without_momentum(config: OptimizerConfig) -> optax.GradientTransformation:
    """For what averages the weights instead."""
    return optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)


_BY_NAME: dict[str, Callable[[OptimizerConfig], Any]] = {
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
    "schedule_free": _adam_without_momentum,
}


def _of_factory(config: OptimizerConfig, model: ModelConfig | None) -> Any:
    """What the user's function makes of the settings."""
    assert config.factory is not None
    field = f"optimizer.factory is {config.factory!r}"
    made = load_own(field, config.factory, "a function")(config, model)
    if not (callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))):
        raise ConfigError(
            f"{field}: it returned {type(made).__name__}; make it return an "
            "optax.GradientTransformation, such as optax.scale_by_adam()"
        )
    return made

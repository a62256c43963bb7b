"""The recurrences on a Hopper through Pallas Mosaic GPU; see `walked_gpu.py`."""

import functools
from typing import Any

import jax

from . import steps
from .steps import Scan
from .walked_gpu import Config, scan

CHANNELS = 32  # of which D must be a multiple: lanes of a warp
FORWARD = Config()
BACKWARD = Config()
MLGRU_FORWARD = Config()
MLGRU_BACKWARD = Config(unroll=8)
# `mlgru_forward` takes held_BT, where the state passes unchanged.
TAKES_HELD = True


def forward(
    *args: Any, config: Config = FORWARD, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`steps.forward` as one kernel."""
    return steps.forward(_bind(config, interpret), *args)


def backward(
    *args: Any, config: Config = BACKWARD, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`steps.backward` as one kernel."""
    return steps.backward(_bind(config, interpret), *args)


def mlgru_forward(
    *args: Any,
    config: Config = MLGRU_FORWARD,
    interpret: bool = False,
    **held: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`steps.mlgru_forward` as one kernel."""
    return steps.mlgru_forward(_bind(config, interpret), *args, **held)


def mlgru_backward(
    *args: Any, config: Config = MLGRU_BACKWARD, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """`steps.mlgru_backward` as one kernel and a small sum."""
    return steps.mlgru_backward(_bind(config, interpret), *args)


def _bind(config: Config, interpret: bool) -> Scan:
    return functools.partial(scan, config=config, interpret=interpret)

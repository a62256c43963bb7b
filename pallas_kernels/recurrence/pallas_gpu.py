"""The linear recurrence, its reverse, and both with the MLGRU's gates fused, on a Hopper.

See `walked_gpu.py` for how. The cuts are the fastest of those measured on an H100 and an H200
(`python -m mmfree_jax.pallas_kernels.recurrence.benchmark`, docs/kernels.md).
"""

import dataclasses
import functools
from typing import Any

import jax

from ..mosaic import MULTIPROCESSORS
from . import steps
from .steps import Scan
from .walked_gpu import WARPS, Config, scan

CHANNELS = 32  # of which D must be a multiple: lanes of a warp
FORWARD = Config()
BACKWARD = Config()
MLGRU_FORWARD = Config()
# Where a program has a multiprocessor to itself, longer stretches: a prompt of 2,048 tokens at
# 2,560 channels takes 23 us rather than 25.
MLGRU_FORWARD_FEW = Config(unroll=32)
MLGRU_BACKWARD = Config(unroll=8)
# With four stages of a tile a multiprocessor holds four programs: of more, some would wait for
# others to end. At 2,560 channels two stages take 0.267 ms, three 0.279, four 0.301.
MLGRU_BACKWARD_MANY = Config(unroll=8, stages=2)
# Stretches that a short row's tiles come out even with, of up to so many tiles. The steps beyond a
# row's end are straight-line code like the others, with marks beside each, and what JAX spends in
# every process on lowering the kernel grows faster than its length (docs/kernels.md).
_SHORTEST, _MOST_TILES = 4, 4
# `mlgru_forward` takes held_BT, where the state passes unchanged.
TAKES_HELD = True


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def forward(
    *args: Any, config: Config = FORWARD, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`steps.forward` as one kernel."""
    return steps.forward(_bind(config, interpret), *args)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def backward(
    *args: Any, config: Config = BACKWARD, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`steps.backward` as one kernel."""
    return steps.backward(_bind(config, interpret), *args)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def mlgru_forward(
    i_BTD: jax.Array,
    *args: Any,
    config: Config | None = None,
    interpret: bool = False,
    **held: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`steps.mlgru_forward` as one kernel."""
    few = _programs(i_BTD) <= MULTIPROCESSORS
    config = config or even(MLGRU_FORWARD_FEW if few else MLGRU_FORWARD, i_BTD.shape[1])
    return steps.mlgru_forward(_bind(config, interpret), i_BTD, *args, **held)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def mlgru_backward(
    i_BTD: jax.Array, *args: Any, config: Config | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """`steps.mlgru_backward` as one kernel and a small sum."""
    many = _programs(i_BTD) > 4 * MULTIPROCESSORS
    config = config or (MLGRU_BACKWARD_MANY if many else MLGRU_BACKWARD)
    return steps.mlgru_backward(_bind(config, interpret), i_BTD, *args)


def even(config: Config, tokens: int) -> Config:
    """`config` with shorter stretches where rows of so few tokens end within one of its tiles."""
    unroll = config.unroll
    while tokens % (WARPS * unroll) and unroll > _SHORTEST:
        unroll //= 2
    tiles, rest = divmod(tokens, WARPS * unroll)
    fits = not rest and tiles <= _MOST_TILES
    return dataclasses.replace(config, unroll=unroll) if fits else config


def _programs(x_BTD: jax.Array) -> int:
    return x_BTD.shape[0] * x_BTD.shape[2] // CHANNELS


def _bind(config: Config, interpret: bool) -> Scan:
    return functools.partial(scan, config=config, interpret=interpret)

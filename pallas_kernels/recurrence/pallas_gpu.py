"""The linear recurrence, its reverse, and both with the MLGRU's gates fused, on NVIDIA GPUs.

The default cuts are the fastest of about fifteen each, measured on one H100 at [8, 2048, 2048]
and [1, 16384, 2048] bfloat16 (`python -m mmfree_jax.pallas_kernels.recurrence.benchmark`).
"""

import functools
from typing import Any

import jax

from . import steps
from .chunked_gpu import Config, scan
from .steps import Scan

FORWARD = Config(unroll=32, block_d=64, num_warps=2)
BACKWARD = Config(unroll=16, block_d=128, num_warps=2)
MLGRU_FORWARD = Config(unroll=16, block_d=64)
# With few rows and channels the chunks of a sequence wait on each other: fewer, longer chunks.
MLGRU_FORWARD_NARROW = Config(unroll=8, blocks=8, block_d=64, reload=True)
# A prompt has so few chunks that more of them, in larger groups, do not wait longer (the fastest
# of sixteen at [1, 2048, 2560]: 36 against 46 us).
MLGRU_FORWARD_PROMPT = Config(unroll=8, blocks=4, block_d=64, reload=True, group=30)
MLGRU_BACKWARD = Config(unroll=8, blocks=4, block_d=64, reload=True)
# `mlgru_forward` takes held_BT, where the state passes unchanged.
TAKES_HELD = True
_WIDE = 8192  # rows times channels from which a chunk fills the chip
_PROMPT = 4096  # most tokens of a prompt


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
    i_BTD: jax.Array,
    *args: Any,
    config: Config | None = None,
    interpret: bool = False,
    **held: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`steps.mlgru_forward` as one kernel."""
    if config is None:
        B, T, D = i_BTD.shape
        config = MLGRU_FORWARD_PROMPT if T <= _PROMPT else MLGRU_FORWARD_NARROW
        if B * D >= _WIDE:
            config = MLGRU_FORWARD
    return steps.mlgru_forward(_bind(config, interpret), i_BTD, *args, **held)


def mlgru_backward(
    *args: Any, config: Config = MLGRU_BACKWARD, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """`steps.mlgru_backward` as one kernel and a small sum."""
    return steps.mlgru_backward(_bind(config, interpret), *args)


def _bind(config: Config, interpret: bool) -> Scan:
    return functools.partial(scan, config=config, interpret=interpret)

"""An estimate of the memory that training takes on each device.

Analytic, from the config alone, so that it can be asked before any hardware is there. It
leaves out the compiler's scratch space and fragmentation: expect the real peak to be
somewhat higher, and see the tests for how close it is.
"""

import contextlib
import dataclasses
import functools
import os
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmfree_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model_config import GROUP, ModelConfig
from mmfree_jax.train.flops import count_parameters
from mmfree_jax.train.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float
    gradients: float
    optimizer: float
    ternary: float
    """The int8 copies of the ternary weights that a step works with; blended ones are in their
    own dtype."""
    activations: float
    """Kept for the backward pass, and the working set of the block being recomputed. Where layers
    are unrolled, only what exceeds their gradients: as the backward pass goes through the layers,
    these take the place of what was kept."""
    logits: float
    """One chunk of logits in float32 and of their gradient in the compute dtype."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


def _block_bytes_per_token(config: ModelConfig, name: str) -> dict[str, float]:
    """What a block of this mixer keeps for its backward pass, in bytes a token, by remat policy."""
    d, m = config.hidden_size, config.glu_size
    c = jnp.dtype(config.compute_dtype).itemsize
    residuals = d * c  # the block's input
    mixer = mixer_of(name)
    kept = mixer.kept(config)
    # Outputs of all products, and what they read.
    products = (sum(rows for rows, _ in mixer.matrices(config).values()) + 2 * m + d) * c
    inputs = (kept.inputs + d + m) * c
    return {
        "full": residuals,
        "stream": residuals + d * c,
        "states": residuals + (d + kept.states) * c,
        "gated": residuals + (d + kept.gated) * c,
        "gates": residuals + (d + kept.gates) * c,
        "projections": residuals + products - d * c,  # the stream, not what is added to it twice
        "dots": residuals + products,
        "none": residuals + products + inputs + kept.float32 * 4 + kept.compute * c,
    }


def estimate_memory(config: TrainConfig, mesh: MeshConfig) -> Memory:
    """The memory of one training step on each device of `mesh`.

    Parameters, gradients and optimiser state are split over fsdp x tensor, rows over
    data x fsdp; the GLU's and the projections' activations over tensor are counted whole.

    Raises:
      ConfigError: `mesh.data` is not given, or the batch does not divide over the mesh.
    """
    if mesh.data < 1:
        raise ConfigError(f"mesh.data is {mesh.data}: set --mesh.data to the number of copies")
    copies = mesh.data * mesh.fsdp
    rows = config.batch_size // config.grad_accum
    if rows % copies:
        raise ConfigError(
            f"batch_size / grad_accum is {rows}, not a multiple of mesh.data x mesh.fsdp "
            f"({copies}): set --batch-size {-(-rows // copies) * copies * config.grad_accum}"
        )
    model = config.model
    parameters = count_parameters(model)
    shards = mesh.fsdp * mesh.tensor
    size = jnp.dtype(model.param_dtype).itemsize
    tokens = rows // copies * config.data.seq_len // mesh.sequence
    kept = {name: _block_bytes_per_token(model, name) for name in model.period}
    activations = sum(kept[name][model.remat] for name in model.layer_mixers) * tokens
    gradients = parameters.total * size / shards
    if not model.scan_layers:
        activations = max(0.0, activations - gradients)
    if model.remat != "none":
        activations += max(of_block["none"] for of_block in kept.values()) * tokens
    activations += max(mixer_of(name).kept(model).working for name in model.period) * 4 * tokens
    chunk = min(tokens, config.loss_chunk)
    compute = jnp.dtype(model.compute_dtype).itemsize
    accumulated = 2 if config.grad_accum > 1 else 1
    groups = model.weight_scale == "groups"
    return Memory(
        parameters=parameters.total * size / shards,
        gradients=gradients * accumulated,
        optimizer=_optimizer_bytes(config.optimizer, config.model) / shards,
        ternary=parameters.ternary
        * (size if config.quantizer.warmup_fraction else 1 + (4 / GROUP) * groups)
        / shards,
        activations=activations,
        logits=chunk * model.vocab_size * (4 + compute) / mesh.tensor,
    )


@functools.lru_cache(maxsize=64)
def _optimizer_bytes(optimizer: OptimizerConfig, model: ModelConfig) -> int:
    """Of the optimiser's state, all devices together; its counters are not counted."""
    params = unflatten(param_shapes(model))
    state = jax.eval_shape(make_optimizer(optimizer, model).init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


_SLACK = 2
"""An estimate must be so many times too large before a run is refused for it."""


def check_fits(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses, before anything is allocated, what is far from fitting into the devices' memory.

    Raises:
      ConfigError: the estimate is more than twice what a device has.
    """
    axes = {name: int(size) for name, size in mesh.shape.items()}
    needed = estimate_memory(config, MeshConfig(**axes)).total
    there = device_memory(mesh.local_devices[0])
    if there is not None and needed > _SLACK * there:
        raise ConfigError(
            f"training needs about {needed / 2**30:,.0f} GiB on each device, which has "
            f"{there / 2**30:,.0f}: lower --batch-size ({config.batch_size}), --data.seq-len "
            f"({config.data.seq_len}) or the model's sizes ({config.model.num_layers} layers of "
            f"{config.model.hidden_size}, vocabulary {config.model.vocab_size}); see mmfree info"
        )


def device_memory(device: Any) -> int | None:
    """Bytes that a device of JAX has; None where it does not tell. A CPU has the process's."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        return None if stats is None else stats.get("bytes_limit")
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    of_process = resource.getrlimit(resource.RLIMIT_AS)[0]
    if of_process != resource.RLIM_INFINITY:
        limits.append(of_process)
    with contextlib.suppress(OSError, ValueError):  # "max": the container has no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)

"""What a step will cost: memory, exchange and time, from a compiled program or before one."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from mmfree_jax.config import MeshConfig, TrainConfig, tokens_per_step
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.ahead.hlo import Collective
from mmfree_jax.launch.ahead.products import count_products, gathered_bytes
from mmfree_jax.launch.ahead.topology import Topology
from mmfree_jax.train.flops import count_parameters
from mmfree_jax.train.memory import estimate_memory

# Memory that the compiler's plan must leave free: the runtime, its collectives' buffers.
_USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, from data sheets."""

    compute: float
    """Matrix products, at the assumed share of the peak rate."""
    near: float
    """Exchange within slices or hosts, at the links' full rate."""
    far: float
    """Exchange between them."""

    @property
    def hidden(self) -> float:
        """The step, if all exchange hides behind computation."""
        return max(self.compute, self.near, self.far)

    @property
    def exposed(self) -> float:
        """The step, if none does."""
        return self.compute + self.near + self.far


def executed_flops(config: TrainConfig, topology: Topology) -> float:
    """Operations of a step over all devices, in bfloat16 ones: an int8 product counts less."""
    device, products = topology.device, count_products(config.model, config.data.seq_len)
    faster = device.int8_over_bf16 if device else 1.0
    return (products.int8 / faster + products.wide + products.mixing) * tokens_per_step(config)


def estimate_times(
    config: TrainConfig,
    topology: Topology,
    collectives: Sequence[Collective],
    peak_share: float,
) -> Times | None:
    """Seconds of a step; None where the devices have no data sheet."""
    device, links = topology.device, topology.links
    if device is None or links is None:
        return None
    rate = topology.count * device.bf16_flops * peak_share
    return Times(
        compute=executed_flops(config, topology) / rate,
        near=sum(c.near for c in collectives) / links.near,
        far=sum(c.far for c in collectives) / links.far,
    )


def fits(gib: float, topology: Topology) -> bool | None:
    """Whether a plan of `gib` a device leaves enough free; None where that is unknown."""
    device = topology.device
    return None if device is None else gib <= _USABLE * device.memory_gib


def expected_collectives(config: TrainConfig, mesh: MeshConfig, topology: Topology) -> list:
    """What the compiler is expected to make of a mesh, to rank meshes before compiling any.

    Ternary weights travel as int8 and float ones in the compute dtype (once forward, once
    backward, once more for what is recomputed; embedding and head once), gradients in float32;
    tensor parallelism reduces the residual stream four times a block.
    """
    model = config.model
    parameters = count_parameters(model)
    d, f, s, t = mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor
    passes = 2 if model.remat in ("none", "dots") else 3
    tokens = tokens_per_step(config) / (d * f * s)
    inner = f * s * t
    whole = topology.each

    def collective(kind: str, size: float, group: int, reach: int) -> Collective:
        """Of a group whose members lie within `reach` neighbouring devices."""
        g = max(1, min(group, reach // whole))
        m = group // g
        far = {"reduce": 2 * (g - 1) / g * size / m, "gather": (g - 1) / g * size / m}[kind]
        near = {"reduce": 2 * (m - 1) / m * size, "gather": (m - 1) / m * size}[kind]
        return Collective(kind, 1, near, far, group)

    found = []
    if f > 1:
        blocks, others = gathered_bytes(model)
        found.append(collective("gather", (passes * blocks + others) / t, f, inner))
        found.append(collective("gather", 4 * parameters.total / t, f, inner))
    if d * s > 1:
        found.append(collective("reduce", 4 * parameters.total / (f * t), d * s, d * inner))
    if t > 1:
        stream = 2 * model.hidden_size * tokens * model.num_layers * (2 + passes)
        found.append(collective("reduce", stream, t, t))
    if s > 1:  # summaries of the recurrence, forward and backward
        carry = 4 * model.state_size * tokens / config.data.seq_len * s
        found.append(collective("gather", 4 * carry * model.num_layers * s, s, s * t))
    return found


def rank_meshes(
    config: TrainConfig, topology: Topology, peak_share: float
) -> list[tuple[MeshConfig, float, Times | None]]:
    """Meshes that divide the devices, the batch and the model: those that fit, fastest first.

    Returns:
      The mesh, the analytic memory a device (GiB) and times of each; those that do not fit
      follow, smallest first.

    Raises:
      ConfigError: none divides.
    """
    found = []
    powers = [2**i for i in range(int(math.log2(topology.count)) + 1)]
    for f, s, t in itertools.product(powers, powers, (1, 2, 4, 8)):
        if topology.count % (f * s * t) or (s > 1 and config.model.mixer != "mlgru"):
            continue
        if s * t > topology.each:
            continue  # exchanged in every layer: never between hosts
        mesh = MeshConfig(data=topology.count // (f * s * t), fsdp=f, sequence=s, tensor=t)
        if why_not(config, mesh) is not None:
            continue
        gib = estimate_memory(config, mesh).total / 2**30
        times = estimate_times(
            config, topology, expected_collectives(config, mesh, topology), peak_share
        )
        found.append((mesh, gib, times))
    if not found:
        raise ConfigError(
            f"no mesh divides {topology.count} devices with batch_size {config.batch_size} / "
            f"grad_accum {config.grad_accum}: set --batch-size to a multiple of a power of two"
        )

    def order(item: tuple[MeshConfig, float, Times | None]) -> tuple[Any, ...]:
        mesh, gib, times = item
        if fits(gib, topology) is False:
            return (1, gib)
        # Between hosts or slices the data axis alone if that fits: its one exchange a step
        # hides better than two a layer.
        inner = mesh.fsdp * mesh.sequence * mesh.tensor
        seconds = 0.0 if times is None else times.hidden + 0.2 * times.exposed
        if mesh.tensor * mesh.sequence > 1:
            seconds *= 1.1  # split matrices and rows leave the fused kernels to XLA
        return (0, inner > topology.each, round(seconds, 4), mesh.tensor * mesh.sequence, inner)

    return sorted(found, key=order)


def why_not(config: TrainConfig, mesh: MeshConfig) -> str | None:
    """Why batch or model do not divide over a mesh; None if they do."""
    from types import SimpleNamespace

    from mmfree_jax.parallel.sharding import check_divisible

    sizes = dataclasses.asdict(mesh)
    try:
        check_divisible(config, SimpleNamespace(shape=sizes))  # type: ignore[arg-type]
    except ConfigError as e:
        return str(e)
    return None

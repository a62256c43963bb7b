"""How the rows of a step lie on the devices, also where some of those they were meant for are gone.

A run keeps its global batch on fewer devices, so that every step sees the rows that it would have
seen: no device gets more rows at once than it was meant to, and more micro-batches do the rest.
Where they do not divide, rows of padding, which weigh nothing, fill the last ones up.
"""

import dataclasses
from dataclasses import dataclass

import jax

from mmfree_jax.config import TrainConfig
from mmfree_jax.parallel.sharding import mesh_shape


@dataclass(frozen=True)
class RowLayout:
    """The rows of one step.

    Attributes:
      rows: of the global batch, with padding behind them.
      micro_batches: that they are split into.
    """

    rows: int
    micro_batches: int


def row_layout(batch_size: int, micro_batches: int, planned: int, devices: int) -> RowLayout:
    """The rows of a step on `devices` devices that was meant for `planned`.

    Of the numbers of micro-batches up to twice the least that the memory allows it takes the one
    with the fewest rows of padding.

    Args:
      batch_size: rows of the global batch.
      micro_batches: that they are split into on all planned devices.
      planned: devices on the mesh's data and fsdp axes by the settings.
      devices: those that there are.
    """
    if planned <= devices:
        return RowLayout(batch_size, micro_batches)
    at_once = -(-batch_size // (micro_batches * planned)) * devices
    least = -(-batch_size // at_once)

    def padded(count: int) -> int:
        whole = count * devices
        return -(-batch_size // whole) * whole

    count = min(range(least, 2 * least + 1), key=padded)
    return RowLayout(padded(count), count)


def on_devices_left(config: TrainConfig, planned_processes: int | None) -> TrainConfig:
    """`config` as a step computes it on the devices that there are.

    Where processes are missing the data axis takes what is left, and `batch_size` and
    `grad_accum` are those of `row_layout`; else it is as it was.

    Args:
      config: of the run.
      planned_processes: number of processes that it is meant for; None: those that there are.

    Raises:
      ConfigError: the mesh does not divide the devices.
    """
    there = jax.process_count()
    if planned_processes is None or planned_processes <= there:
        return config
    count = jax.device_count()
    planned = mesh_shape(config.mesh, count * planned_processes // there)
    mesh = dataclasses.replace(config.mesh, data=-1)
    shape = mesh_shape(mesh, count)
    layout = row_layout(
        config.batch_size, config.grad_accum, planned[0] * planned[1], shape[0] * shape[1]
    )
    return dataclasses.replace(
        config, mesh=mesh, batch_size=layout.rows, grad_accum=layout.micro_batches
    )

"""Speed and memory of the training step on this machine."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import TrainConfig, tokens_per_step
from mmfree_jax.model.kernel_choice import check_kernels
from mmfree_jax.parallel.sharding import batch_sharding, check_divisible, make_mesh
from mmfree_jax.train.flops import count_flops, count_parameters
from mmfree_jax.train.memory import check_fits
from mmfree_jax.train.optimizer import Optimizer, make_optimizer
from mmfree_jax.train.schedule import ScheduleValues, schedule_values
from mmfree_jax.train.step import init_sharded, jit_train_step, state_shapes

TRACED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class TrainMeasurement:
    """What one configuration of the training step costs."""

    family: str
    parameters: int
    batch_size: int
    seq_len: int
    devices: int
    device_kind: str
    compile_s: float
    step_ms: float
    """Median over the timed steps."""
    spread_ms: float
    """Slowest less fastest of the timed groups of steps."""
    tokens_per_s: float
    model_tflops: float
    """Analytic model FLOPs a second over all devices, in 1e12."""
    peak_gib: float | None
    """Largest memory in use on the first device (GiB); None where the device does not tell."""
    loss: float
    """Of the last step; random tokens, so about ln(vocab_size)."""
    finite: bool
    """Whether its loss and gradient were; where not, the steps changed nothing."""


class CompiledStep(NamedTuple):
    """The training step of one configuration, and what it is called with.

    Attributes:
      step: compiled (state, batch, schedule) -> (state, metrics).
      mesh: it runs on.
      optimizer: whose state is in the training state.
      schedule: of the learning rate, on the host.
      seconds: that compiling took.
    """

    step: jax.stages.Compiled
    mesh: Mesh
    optimizer: Optimizer
    schedule: ScheduleValues
    seconds: float

    @property
    def schedule_sharding(self) -> NamedSharding:
        """Where the step wants its schedule: everywhere."""
        return NamedSharding(self.mesh, P())


def compile_train_step(config: TrainConfig, devices: Sequence[Any] | None = None) -> CompiledStep:
    """Compiles the step from shapes alone, on the given devices or all that are here.

    Called first in a process it lowers to the same text as in any other such process, so that
    JAX's compilation cache finds what another has compiled.

    Raises:
      ConfigError: batch or model do not divide over the mesh, or are far too large for it, or a
        kernel is of other devices.
    """
    begin = time.perf_counter()
    mesh = make_mesh(config.mesh, devices)
    check_divisible(config, mesh)
    check_kernels(config.model, mesh.devices.flat[0].platform)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.model)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    schedule = schedule_values(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        step = jit_train_step(config, optimizer, mesh)
        lowered = step.lower(state_shapes(config, optimizer), batch, schedule)
        step = lowered.compile()
    return CompiledStep(step, mesh, optimizer, schedule, time.perf_counter() - begin)


def measure_train_step(
    config: TrainConfig,
    *,
    groups: int = 5,
    steps_per_group: int = 4,
    warmup: int = 2,
    trace_dir: Path | None = None,
    compiled: CompiledStep | None = None,
) -> TrainMeasurement:
    """Times the compiled training step on random tokens that are already on the device.

    Steps are queued in groups and each group is waited for, as the training loop would
    keep the device busy. Run one configuration a process: the peak is the process's.

    Args:
      config: of the run; its data are not read.
      groups: groups of steps to time.
      steps_per_group: steps queued at once.
      warmup: steps before the timing.
      trace_dir: folder for a profiler trace of `TRACED_STEPS` more steps behind the timing;
        None: no trace.
      compiled: the step, if it is there already.

    Raises:
      ConfigError: batch or model do not divide over the mesh, or are far too large for it, or a
        kernel is of other devices.
    """
    compiled = compiled or compile_train_step(config)
    step, mesh = compiled.step, compiled.mesh
    schedule = jax.device_put(compiled.schedule, compiled.schedule_sharding)
    state = init_sharded(config, compiled.optimizer, mesh)
    batch = random_batch(config, mesh)

    for _ in range(warmup):
        state, metrics = step(state, batch, schedule)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(groups):
        begin = time.perf_counter()
        for _ in range(steps_per_group):
            state, metrics = step(state, batch, schedule)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - begin) / steps_per_group)
    seconds = statistics.median(times)
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if trace_dir is not None:
        with jax.profiler.trace(str(trace_dir)):
            for _ in range(TRACED_STEPS):
                state, metrics = step(state, batch, schedule)
            jax.block_until_ready(metrics)
    rate = tokens_per_step(config) / seconds
    return TrainMeasurement(
        family=config.model.family,
        parameters=count_parameters(config.model).total,
        batch_size=config.batch_size,
        seq_len=config.data.seq_len,
        devices=mesh.size,
        device_kind=jax.devices()[0].device_kind,
        compile_s=compiled.seconds,
        step_ms=1e3 * seconds,
        spread_ms=1e3 * (max(times) - min(times)),
        tokens_per_s=rate,
        model_tflops=1e-12 * rate * count_flops(config.model, config.data.seq_len).training,
        peak_gib=None if peak is None else peak / 2**30,
        loss=float(metrics["loss"]),
        finite=bool(metrics["finite"]),
    )


def random_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch of random tokens on the mesh."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.seq_len + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    host = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((shape[0], shape[1] - 1), np.int32),
    }
    sharding = batch_sharding(mesh)
    return {name: jax.device_put(value, sharding) for name, value in host.items()}

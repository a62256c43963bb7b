"""What saving costs the training, and what restoring takes."""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.experiments.bench.train import CompiledStep, random_batch
from mmfree_jax.saved.checkpoint import Checkpointer, restore
from mmfree_jax.saved.manifest import verify
from mmfree_jax.train.step import abstract_state, init_sharded

_STEPS = 5
_NO_DATA = {"fingerprints": [], "tokens": [], "paths": [], "tokenizer": {}}


def measure_checkpoint(
    config: TrainConfig, compiled: CompiledStep, folder: Path
) -> dict[str, float | int]:
    """Trains through two saves, then verifies and restores the last.

    Args:
      config: of the run.
      compiled: its step.
      folder: on the disk that is measured.

    Returns:
      "gib" of state, and seconds: "step_s" of a step without a save; of the second save
      "save_blocked_s" (its call), "save_stall_s" (what the `save_steps` steps beside it and the
      call took longer than the steps alone) and "save_s" until it is whole; "first_stall_s" of
      the first, which also gets its memory; "verify_s", and "restore_s" with that.
    """
    mesh, optimizer = compiled.mesh, compiled.optimizer
    state = init_sharded(config, optimizer, mesh)
    schedule = jax.device_put(compiled.schedule, compiled.schedule_sharding)
    batch = random_batch(config, mesh)

    def step() -> None:
        nonlocal state
        state, metrics = compiled.step(state, batch, schedule)
        jax.block_until_ready(metrics)

    for _ in range(2):
        step()
    alone = statistics.median(_seconds(step) for _ in range(_STEPS))
    checkpointer = Checkpointer(folder / "checkpoints")
    metadata = {"config": to_dict(config), "data": _NO_DATA}
    stalls, blocked, saved, steps = [], 0.0, 0.0, 0
    for number in (1, 2):
        begin = time.perf_counter()
        checkpointer.save(number, state, metadata)
        blocked, steps = time.perf_counter() - begin, 0
        while checkpointer.is_saving:
            step()
            steps += 1
        saved = time.perf_counter() - begin
        stalls.append(saved - steps * alone)
        checkpointer.wait()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    del state
    path = folder / "checkpoints" / "2"
    verified = _seconds(lambda: verify(path))
    abstract = abstract_state(config, optimizer, mesh)
    loaded = _seconds(
        lambda: jax.block_until_ready(restore(path, abstract, check_files=False).state)
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        "gib": size / 2**30,
        "step_s": alone,
        "first_stall_s": stalls[0],
        "save_blocked_s": blocked,
        "save_stall_s": stalls[1],
        "save_steps": steps,
        "save_s": saved,
        "verify_s": verified,
        "restore_s": verified + loaded,
    }


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin

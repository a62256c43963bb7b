"""One configuration in a process of its own: compile, wait for the word, measure, write.

    python -m launch.scaling.worker FOLDER

FOLDER holds case.json. The worker compiles into JAX's shared cache without running anything on
the devices, writes `compiled.json`, waits for a file `go`, and writes `result.json`; so all
configurations can compile at the same time, and each has its devices to itself when it is
timed.
"""

import dataclasses
import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from launch.scaling.plan import Case, train_config
from mmfree_jax.config import tokens_per_step
from mmfree_jax.train.flops import count_flops


def read_case(path: Path) -> Case:
    """A case as `write_case` wrote it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Case(**values | {"changes": tuple(map(tuple, values["changes"]))})


def write_case(path: Path, case: Case) -> None:
    """Writes a case as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(case)), encoding="utf-8")


def compile_only(case: Case) -> dict[str, Any]:
    """Compiles what the measurement will run, from shapes alone.

    Returns:
      Seconds, and the memory that the compiler planned on each device (GiB).
    """
    import jax
    import jax.numpy as jnp

    from mmfree_jax.sharding import check_divisible, make_mesh
    from mmfree_jax.train.optimizer import make_optimizer, schedule_values
    from mmfree_jax.train.step import jit_init, jit_train_step, state_shapes

    config = train_config(case)
    mesh = make_mesh(config.mesh)
    check_divisible(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    shapes = state_shapes(config, optimizer)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    schedule = schedule_values(config.optimizer, config.steps)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jit_train_step(config, optimizer, mesh).lower(shapes, batch, schedule).compile()
        jit_init(config, optimizer, mesh).lower(jax.random.key(config.seed)).compile()
    seconds = time.perf_counter() - begin
    return {"compile_s": seconds, **_planned(compiled)}


def _planned(compiled: Any) -> dict[str, float]:
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"planned_gib": total / 2**30}


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Times the step, and saving and restoring if the case asks for it."""
    from mmfree_jax.bench.train import measure_train_step

    config = train_config(case)
    timing = timing_of(case)
    result = dataclasses.asdict(measure_train_step(config, **timing)) | {"timing": timing}
    if case.checkpoint:
        result["checkpoint"] = measure_checkpoint(case, folder)
    return result


def timing_of(case: Case) -> dict[str, int]:
    """How many steps to time: fewer of those that will take long.

    At a rough 3e14 operations a second on each device, about six seconds of them.
    """
    config = train_config(case)
    work = count_flops(config.model, case.seq_len).training * tokens_per_step(config)
    seconds = work / (3e14 * case.devices)
    if seconds > 1.5:
        return {"groups": 3, "steps_per_group": 1, "warmup": 1}
    return {"groups": 5, "steps_per_group": max(1, min(4, round(1.2 / seconds))), "warmup": 2}


def measure_checkpoint(case: Case, folder: Path) -> dict[str, float]:
    """Seconds that a save keeps the training waiting, until it is whole, and for a restore."""
    import jax

    from mmfree_jax.sharding import make_mesh, state_shardings
    from mmfree_jax.train.checkpoint import Checkpointer, restore, verify
    from mmfree_jax.train.optimizer import make_optimizer
    from mmfree_jax.train.step import init_sharded, state_shapes

    config = train_config(case)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer)
    state = jax.block_until_ready(init_sharded(config, optimizer, mesh))
    checkpoints = folder / "checkpoints"
    checkpointer = Checkpointer(checkpoints)
    begin = time.perf_counter()
    checkpointer.save(1, state, {})
    blocked = time.perf_counter() - begin
    checkpointer.wait()
    saved = time.perf_counter() - begin
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state_shapes(config, optimizer),
        state_shardings(mesh, state),
    )
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    del state
    path = checkpoints / "1"
    begin = time.perf_counter()
    verify(path)
    verified = time.perf_counter() - begin
    jax.block_until_ready(restore(path, abstract, check_files=False).state)
    restored = time.perf_counter() - begin
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "gib": size / 2**30,
        "save_blocked_s": blocked,
        "save_s": saved,
        "verify_s": verified,
        "restore_s": restored,
    }


def main(folder: Path) -> int:
    """Runs the worker on `folder`."""
    case = read_case(folder / "case.json")

    def write(name: str, values: dict[str, Any]) -> None:
        beside = folder / f".{name}.tmp"
        beside.write_text(json.dumps(values), encoding="utf-8")
        beside.replace(folder / name)

    try:
        write("compiled.json", compile_only(case))
        while not (folder / "go").exists():
            time.sleep(0.05)
        write("result.json", measure(case, folder))
    except Exception as e:
        traceback.print_exc()
        text = " ".join(str(e).split())
        reason = "out of memory" if "RESOURCE_EXHAUSTED" in text else type(e).__name__
        write("result.json", {"error": f"{reason}: {text[:400]}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

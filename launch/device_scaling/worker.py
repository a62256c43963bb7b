"""One configuration in a process of its own: compile, wait for the word, measure, write.

    python -m mmfree_jax.launch.device_scaling.worker compile FOLDER
    python -m mmfree_jax.launch.device_scaling.worker measure FOLDER

FOLDER holds case.json. "compile" compiles into JAX's shared cache and writes `compiled.json`;
all configurations do so at the same time. "measure" waits for a file `go` before it touches a
device, and writes `result.json`. They are two processes because a compiler that has tried its
choices on a device keeps that memory until its process ends.
"""

import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from mmfree_jax.config import tokens_per_step
from mmfree_jax.files import write_text
from mmfree_jax.launch.device_scaling.plan import Case, train_config
from mmfree_jax.train.flops import count_flops


def read_case(path: Path) -> Case:
    """A case as `write_case` wrote it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    changes = tuple(map(tuple, values["changes"]))
    return Case(**values | {"changes": changes, "flags": tuple(values["flags"])})


def write_case(path: Path, case: Case) -> None:
    """Writes a case as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(case)))


def compile_only(case: Case) -> dict[str, Any]:
    """Compiles what the measurement will run into JAX's cache.

    Returns:
      Seconds, and the memory that the compiler planned on each device (GiB).
    """
    import jax

    from mmfree_jax.experiments.bench.train import compile_train_step
    from mmfree_jax.train.step import jit_init

    config = train_config(case)
    begin = time.perf_counter()
    compiled = compile_train_step(config)
    with jax.set_mesh(compiled.mesh):
        init = jit_init(config, compiled.optimizer, compiled.mesh)
        init.lower(jax.random.key(config.seed)).compile()
    return {"compile_s": time.perf_counter() - begin, **_planned(compiled.step)}


def _planned(compiled: Any) -> dict[str, float]:
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"planned_gib": total / 2**30}


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Times the step, traces it, and times saving and restoring, as the case asks for it."""
    from mmfree_jax.experiments.bench.train import compile_train_step, measure_train_step

    config = train_config(case)
    compiled = compile_train_step(config)
    timing = timing_of(case)
    trace_dir = folder / "trace" if case.trace else None
    measured = measure_train_step(config, **timing, trace_dir=trace_dir, compiled=compiled)
    result = dataclasses.asdict(measured) | {"timing": timing}
    if trace_dir is not None:
        result |= summarise_trace(trace_dir, case.name, folder / "timeline.png")
    if case.checkpoint:
        from mmfree_jax.launch.device_scaling.saving import measure_checkpoint

        result["checkpoint"] = measure_checkpoint(config, compiled, folder)
    return result


def summarise_trace(trace_dir: Path, name: str, figure: Path) -> dict[str, Any]:
    """What a step's collectives took (ms), how much of it ran beside other kernels, a figure."""
    from mmfree_jax.experiments.bench.trace import (
        exchange,
        kernel_times,
        plot_timeline,
        read_kernels,
    )
    from mmfree_jax.experiments.bench.train import TRACED_STEPS

    kernels = read_kernels(trace_dir)
    moved = exchange(kernels)
    plot_timeline(kernels, figure, title=f"{TRACED_STEPS} steps of {name}, first device")
    return {
        "exchange": {
            "ms_a_step": moved.total_ms / TRACED_STEPS,
            "hidden_ms_a_step": moved.hidden_ms / TRACED_STEPS,
            "collectives": [t._asdict() for t in kernel_times([k for k in kernels if k.exchanges])],
        }
    }


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


def main(stage: str, folder: Path) -> int:
    """Runs one stage ("compile" or "measure") of the case in `folder`."""
    case = read_case(folder / "case.json")

    def write(name: str, values: dict[str, Any]) -> None:
        write_text(folder / name, json.dumps(values))

    try:
        if stage == "compile":
            write("compiled.json", compile_only(case))
        else:
            import mmfree_jax.experiments.bench.train  # noqa: F401  while others have the devices

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
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))

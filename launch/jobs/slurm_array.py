"""A sweep as a SLURM job array: each task runs its shard, stage after stage."""

import dataclasses
import shlex
from collections.abc import Sequence

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.launch.jobs.fields import require
from mmfree_jax.launch.jobs.slurm import SlurmJob, common
from mmfree_jax.launch.jobs.template import check_script, fill
from mmfree_jax.ranges import Count

_NOTICE_SECONDS = 300
_SET_BY_THE_ARRAY = ("--shard", "--stage", "--gpus")


@dataclasses.dataclass(frozen=True)
class SlurmArray(SlurmJob):
    """A sweep on a SLURM cluster with GPUs: a job array whose tasks share its runs."""

    tasks: Count | None = None
    """Tasks of the array; each runs every tasks-th run of the sweep."""
    gpus: Count = 1
    """GPUs of each task; several have runs of their own."""


def render_array(values: SlurmArray, words: Sequence[str], sweep: SweepConfig) -> str:
    """The job file whose tasks run `mmfree` with `words`, which begin with "sweep run".

    Run by bash it submits itself: once, or for a sweep that tunes rates once a stage, the main
    runs after all tasks of the tuning runs.

    Raises:
      ConfigError: a value is missing or malformed, or words give what the array decides.
    """
    require(values, "slurm", "name", "tasks")
    for word in words:
        if (option := word.partition("=")[0]) in _SET_BY_THE_ARRAY:
            raise ConfigError(f"{option} is given behind --: leave it out, the array decides it")
    filled = common(values, _NOTICE_SECONDS)
    start = f"srun --ntasks=1 {filled['container']}" if filled["container"] else ""
    text = fill("slurm-array.sbatch", filled | {
        "last": (values.tasks or 1) - 1,
        "gpus": values.gpus,
        "cpus": values.gpus * values.cpus_per_gpu,
        "stages": "tuning main" if sweep.tuning.is_on else "all",
        "command": start + shlex.join(["mmfree", *words]),
    })  # fmt: skip
    check_script(text)
    return text

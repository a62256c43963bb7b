"""A sweep as a SLURM job array: each task runs its shard, stage after stage."""

import dataclasses
import shlex
from collections.abc import Sequence

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.launch.render import (
    check_script,
    fill,
    partition_and_account,
    plain,
    require_values,
)
from mmfree_jax.ranges import Count, CountOrZero

_SET_BY_THE_ARRAY = ("--shard", "--stage", "--gpus")


@dataclasses.dataclass(frozen=True)
class SlurmArray:
    """A sweep on a SLURM cluster with GPUs: a job array whose tasks share its runs."""

    name: str | None = None
    """Name of the job."""
    tasks: Count | None = None
    """Tasks of the array; each runs every tasks-th run of the sweep."""
    gpus: Count = 1
    """GPUs of each task; several have runs of their own."""
    cpus_per_gpu: Count = 8
    """Cores for each GPU."""
    time: str = "24:00:00"
    """Time limit; when it is over the runs save, and the task is put back in the queue."""
    partition: str | None = None
    """Partition; None: the cluster's default."""
    account: str | None = None
    """Account; None: your default."""
    setup: str = ""
    """Shell line that makes `mmfree` available, such as: source /shared/venv/bin/activate."""
    restarts: CountOrZero = 100
    """How often a task may go back into the queue by itself."""


def render_array(values: SlurmArray, words: Sequence[str], sweep: SweepConfig) -> str:
    """The job file whose tasks run `mmfree` with `words`, which begin with "sweep run".

    Run by bash it submits itself: once, or for a sweep that tunes rates once a stage, the main
    runs after all tasks of the tuning runs.

    Raises:
      ConfigError: a value is missing or malformed, or words give what the array decides.
    """
    require_values(values, "slurm")
    for word in words:
        if (option := word.partition("=")[0]) in _SET_BY_THE_ARRAY:
            raise ConfigError(f"{option} is given behind --: leave it out, the array decides it")
    text = fill("slurm-array.sbatch", {
        "name": plain("name", values.name or ""),
        "last": (values.tasks or 1) - 1,
        "gpus": values.gpus,
        "cpus": values.gpus * values.cpus_per_gpu,
        "time": plain("time", values.time, r"[\d:-]+"),
        "optional_directives": partition_and_account(values.partition, values.account),
        "setup": values.setup or ":",
        "stages": "tuning main" if sweep.tuning.is_on else "all",
        "command": shlex.join(["mmfree", *words]),
        "restarts": values.restarts,
    })  # fmt: skip
    check_script(text)
    return text

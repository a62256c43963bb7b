"""How the processes of a run find each other, and when they give up: flags over the environment.

Nothing here imports JAX, so that a command's help does not start it.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.notices import Kind
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, check_numbers

EXIT_LOST = 75
"""Exit code of a process that gave up because another is gone or hangs: EX_TEMPFAIL, try again."""
PLANNED = "MMFREE_PLANNED_PROCESSES"
"""Variable with the number of processes that the settings are for."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How the processes of a run find each other. Unset: from the environment."""

    coordinator: str | None = None
    """Address of process 0, host:port; else $JAX_COORDINATOR_ADDRESS, SLURM, Open MPI, TPU, GKE."""
    count: Count | None = None
    """Number of processes; else $JAX_NUM_PROCESSES, or as above."""
    index: CountOrZero | None = None
    """Which one this is, from 0; else $JAX_PROCESS_ID, or as above."""
    planned: Count | None = None
    """Number of processes that batch and mesh are meant for; else $MMFREE_PLANNED_PROCESSES. Fewer
    keep the rows of each step: mesh.data takes what is left, by more micro-batches and padding."""
    join_seconds: AboveZero = 300.0
    """How long to wait for the others at the start."""
    beat_seconds: AboveZero = 2.0
    """Seconds between signs of life."""
    silent_seconds: AboveZero = 60.0
    """Give up when a process has shown no sign of life for this long."""
    hang_seconds: AboveZero = 1200.0
    """Give up when a process has finished nothing (step, evaluation, save) for this long."""
    notices: Kind = "auto"
    """Save and stop as Compute Engine announces that it preempts this machine or ends it for
    maintenance; auto: on its machines, and where $GCE_METADATA_HOST is set."""

    def __post_init__(self) -> None:
        if self.coordinator is not None and not re.search(r".:\d+$", self.coordinator):
            raise ConfigError(
                f"processes.coordinator is {self.coordinator!r}: set --processes.coordinator "
                "HOST:PORT, of process 0"
            )
        check_numbers(self, "processes.")
        if self.count is not None and self.index is not None and self.index >= self.count:
            raise ConfigError(
                f"processes.index is {self.index}: set --processes.index 0 to {self.count - 1}"
            )


def find_processes(options: ProcessOptions, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None where the process is alone.

    What is left out of them JAX finds itself: it knows SLURM, Open MPI, TPU pods and GKE.

    Raises:
      ConfigError: a variable is not a number, or coordinator, count and index are incomplete.
    """
    found: dict[str, Any] = {
        "coordinator_address": options.coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": options.count
        if options.count is not None
        else _number(environ, "JAX_NUM_PROCESSES"),
        "process_id": options.index
        if options.index is not None
        else _number(environ, "JAX_PROCESS_ID"),
    }
    given = {name: value for name, value in found.items() if value is not None}
    if len(given) < len(found) and _is_managed(environ):
        return given
    if not given or found["num_processes"] == 1:
        return None
    if len(given) < len(found):
        flags = {
            "coordinator_address": "--processes.coordinator",
            "num_processes": "--processes.count",
            "process_id": "--processes.index",
        }
        missing = " and ".join(flags[name] for name in found if name not in given)
        raise ConfigError(f"{missing} missing: outside SLURM, Open MPI and TPU pods give all three")
    # Everything is known: JAX need not look around, and must not pick one device a process.
    return given | {"cluster_detection_method": "deactivate"}


def planned_processes(
    options: ProcessOptions, environ: Mapping[str, str] = os.environ
) -> int | None:
    """Number of processes that the settings are for; None: those that there are.

    Raises:
      ConfigError: the variable is not a number.
    """
    return _number(environ, PLANNED) if options.planned is None else options.planned


def _number(environ: Mapping[str, str], name: str) -> int | None:
    if name not in environ:
        return None
    if not environ[name].isdecimal():
        raise ConfigError(f"${name} is {environ[name]!r}: set a number")
    return int(environ[name])


def _is_managed(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows started several processes, or this is a TPU host."""
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        return int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))) > 1
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return int(environ["OMPI_COMM_WORLD_SIZE"]) > 1
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in environ:
        return True
    # A host of a TPU pod knows its siblings from the metadata server alone, which JAX asks.
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    has_tpu = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return (
        has_tpu
        and "tpu" in platforms
        and "TPU_SKIP_MDS_QUERY" not in environ
        and importlib.util.find_spec("libtpu") is not None
    )

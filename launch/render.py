"""Job files for SLURM, TPU VMs, GKE and SkyPilot from a handful of values."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.jobs.gke import Gke, render_gke
from mmfree_jax.launch.jobs.sky import Sky, render_sky
from mmfree_jax.launch.jobs.slurm import Slurm, SlurmJob, mounted_folders, render_slurm
from mmfree_jax.launch.jobs.tpu_vm import TpuVm, render_tpu_vm

PLATFORMS: dict[str, type] = {"slurm": Slurm, "tpu-vm": TpuVm, "gke": Gke, "sky": Sky}


def render(values: Any, train: Sequence[str]) -> str:
    """The job file for `values` that runs `mmfree train` with the arguments `train`.

    Raises:
      ConfigError: a value is missing or malformed, or the result does not pass its check.
    """
    if not train:
        raise ConfigError("no arguments for mmfree train: give them after --")
    if isinstance(values, Slurm):
        return render_slurm(values, train)
    if isinstance(values, TpuVm):
        return render_tpu_vm(values, train)
    if isinstance(values, Sky):
        return render_sky(values, train)
    return render_gke(values, train)


def check_run_dir(values: Any, run_dir: str) -> None:
    """Refuses a run directory that vanishes with the machine or container it is on.

    Raises:
      ConfigError: run_dir is not in a folder that all hosts mount.
    """
    if isinstance(values, SlurmJob):
        mounts = mounted_folders(values)
        option = "container_mounts"
    else:
        mounts, option = [values.mount], "mount"
    if mounts is None or "://" in run_dir:
        return  # a cluster's nodes share what the user's shell sees, all machines a bucket
    if isinstance(values, Gke) and values.claim is None:
        raise ConfigError(
            f"run_dir is {run_dir!r}, in the pods, which lose it: give --claim for a file system "
            "that they share, or --run-dir gs://BUCKET/NAME behind --"
        )
    if isinstance(values, Sky) and values.bucket is None:
        raise ConfigError(
            f"run_dir is {run_dir!r}, on the machines, which are taken away: give --bucket for one "
            "that they mount, or --run-dir gs://BUCKET/NAME behind --"
        )
    path = PurePosixPath(run_dir)
    if ".." in path.parts or not any(path.is_relative_to(mount) for mount in mounts):
        raise ConfigError(
            f"run_dir is {run_dir!r}, outside of {option} ({', '.join(mounts)}): the hosts would "
            f"not share it, and checkpoints would be lost with them; give --run-dir "
            f"{mounts[0]}/NAME behind --"
        )

"""A run on a SLURM cluster: one process a GPU."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.jobs.fields import plain, require
from mmfree_jax.launch.jobs.template import check_script, fill
from mmfree_jax.launch.xla_flags import OVERLAP
from mmfree_jax.ranges import Count, CountOrZero

_NOTICE_SECONDS = 120
_WORDS = r"[A-Za-z0-9_.:@/+-]+"  # a partition, an account, a quality of service
_EXPRESSION = r"[A-Za-z0-9_.:@/+*&|,()\[\]-]+"
_DIRECTIVES = {
    "partition": (_WORDS, "use A to Z, a to z, digits and . _ : @ / + - only"),
    "account": (_WORDS, "use A to Z, a to z, digits and . _ : @ / + - only"),
    "qos": (_WORDS, "use A to Z, a to z, digits and . _ : @ / + - only"),
    "mem": (r"\d+[KMGT]?", "give a number and K, M, G or T, as in 900G"),
    "constraint": (_EXPRESSION, "give features, as in h100&ib"),
}


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """What jobs and job arrays on a SLURM cluster have alike."""

    name: str | None = None
    """Name of the job."""
    time: str = "24:00:00"
    """Time limit; when it is over the job saves, and is put back in the queue."""
    cpus_per_gpu: Count = 8
    """Cores for each GPU's process."""
    partition: str | None = None
    """Partition; None: the cluster's default."""
    account: str | None = None
    """Account; None: your default."""
    qos: str | None = None
    """Quality of service; None: your default."""
    mem: str | None = None
    """Memory of each node, such as 900G; None: the cluster's default."""
    constraint: str | None = None
    """Features that nodes must have, such as h100&ib."""
    container_image: str | None = None
    """Image that the processes run in, where the cluster has Pyxis: registry#image:tag, or a .sqsh
    file; None: none."""
    container_mounts: str | None = None
    """Folders of the host in it, such as /shared:/shared,/scratch:/scratch."""
    setup: str = ""
    """Shell line that makes `mmfree` available, such as: source /shared/venv/bin/activate."""
    restarts: CountOrZero = 100
    """How often the job may go back into the queue by itself."""
    failures: Count = 3
    """How many times in a row it may fail within ten minutes of its start before it stays out."""


@dataclasses.dataclass(frozen=True)
class Slurm(SlurmJob):
    """A SLURM cluster with GPUs: one process a GPU."""

    nodes: Count | None = None
    """Number of nodes."""
    gpus_per_node: Count = 8
    """GPUs of each node."""


def render_slurm(values: Slurm, train: Sequence[str]) -> str:
    """The job file whose processes run `mmfree train` with the arguments `train`.

    Raises:
      ConfigError: a value is missing or malformed.
    """
    require(values, "slurm", "name", "nodes")
    text = fill("slurm.sbatch", common(values, _NOTICE_SECONDS) | {
        "nodes": values.nodes,
        "gpus_per_node": values.gpus_per_node,
        "cpus_per_gpu": values.cpus_per_gpu,
        "xla_flags": shlex.quote(" ".join(OVERLAP)),
        "command": shlex.join(["mmfree", "train", *train]),
    })  # fmt: skip
    check_script(text)
    return text


def common(values: SlurmJob, notice_seconds: int) -> dict[str, Any]:
    """What the templates of jobs and of arrays both have.

    Raises:
      ConfigError: a value is malformed, or the time limit is over before the job has begun.
    """
    if _seconds(values.time) <= notice_seconds:
        raise ConfigError(
            f"time is {values.time!r}: give more than the {notice_seconds} s before its end in "
            "which the job saves"
        )
    given = {name: getattr(values, name) for name in _DIRECTIVES}
    directives = [
        f"#SBATCH --{name}={plain(name, value, *_DIRECTIVES[name])}\n"
        for name, value in given.items()
        if value
    ]
    if values.container_mounts and not values.container_image:
        raise ConfigError(
            f"container_mounts is {values.container_mounts!r} without an image: give "
            "--container-image too"
        )
    if values.container_image and not values.container_mounts:
        raise ConfigError(
            f"container_image is {values.container_image!r} and nothing is mounted in it: give "
            "--container-mounts with the folders of data and runs, as in /shared:/shared"
        )
    container = [
        f"--container-{name}={value}"
        for name, value in (("image", values.container_image), ("mounts", values.container_mounts))
        if value
    ]
    return {
        "name": plain("name", values.name or ""),
        "time": values.time,
        "notice": notice_seconds,
        "optional_directives": "".join(directives),
        "container": "".join(shlex.quote(option) + " " for option in container),
        "setup": values.setup or ":",
        "requeue": fill(
            "slurm-requeue.sh", {"restarts": values.restarts, "failures": values.failures}
        ),
    }


def mounted_folders(values: SlurmJob) -> list[str] | None:
    """The folders of the host that a container sees, by their names in it; None without one."""
    if values.container_image is None:
        return None
    parts = [mount.split(":") for mount in (values.container_mounts or "").split(",")]
    return [part[1] if len(part) > 1 and part[1] else part[0] for part in parts]


def _seconds(time: str) -> int:
    """A time limit as sbatch reads it: MINUTES[:SECONDS], H:M:S or D-H[:M[:S]], in seconds."""
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,4}))?(?::(\d{1,4}))?", time, re.ASCII)
    if match is None:
        raise ConfigError(f"time is {time!r}: give hours:minutes:seconds or days-hours")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:  # hours, minutes, seconds
        units = (3600, 60, 1)
    else:  # minutes; minutes, seconds; hours, minutes, seconds
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))

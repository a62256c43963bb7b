"""A TPU pod slice of VMs, over gcloud."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from mmfree_jax.launch.jobs.fields import require
from mmfree_jax.launch.jobs.template import check_script, fill
from mmfree_jax.places import Place, check_local


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """A TPU pod slice of VMs, over gcloud: one process a host."""

    name: str | None = None
    """Name of the TPU."""
    project: str | None = None
    """Google Cloud project."""
    zone: str | None = None
    """Zone, such as us-central1-a."""
    accelerator_type: str | None = None
    """Type and size, such as v5litepod-256."""
    runtime_version: str = "v2-alpha-tpuv5-lite"
    """Software version of the VMs."""
    package: str | None = None
    """What pip installs on every host: a clone or a wheel on the file system that all mount, with
    the extra behind it, such as /mnt/shared/mmfree-jax[tpu]."""
    nfs: str | None = None
    """File system that all hosts mount for data and runs, such as 10.0.0.2:/volume."""
    mount: Place = "/mnt/shared"
    """Where it is mounted."""


def render_tpu_vm(values: TpuVm, train: Sequence[str]) -> str:
    """The script that makes the TPU and starts `mmfree train` with `train` on its hosts.

    Raises:
      ConfigError: a value is missing or malformed.
    """
    require(
        values, "tpu-vm", "name", "project", "zone", "accelerator_type", "runtime_version",
        "package", "nfs", "mount",
    )  # fmt: skip
    if "://" in (values.nfs or ""):  # elsewhere HOST:/VOLUME
        check_local(values.nfs or "", "nfs")
    text = fill("tpu-vm.sh", _tpu_vm(values, train))
    check_script(text)
    return text


def _tpu_vm(values: TpuVm, train: Sequence[str]) -> dict[str, Any]:
    mount, nfs = shlex.quote(values.mount), shlex.quote(values.nfs or "")
    setup = (
        f"sudo apt-get install -y -q nfs-common && sudo mkdir -p {mount} && "
        f"(mountpoint -q {mount} || sudo mount {nfs} {mount}) && "
        f"python3 -m venv mmfree && mmfree/bin/pip install -q {shlex.quote(values.package or '')}"
    )
    run = shlex.join(["mmfree/bin/mmfree", "train", *train])
    start = f"nohup {run} > mmfree.log 2>&1 < /dev/null & echo $! > mmfree.pid"
    quoted = ("name", "project", "zone", "accelerator_type", "runtime_version")
    return {name: shlex.quote(getattr(values, name)) for name in quoted} | {
        "setup_command": shlex.quote(setup),
        "train_command": shlex.quote(start),
    }

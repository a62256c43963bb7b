"""A TPU pod slice of VMs, over gcloud."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from mmfree_jax.launch.jobs.fields import require
from mmfree_jax.launch.jobs.template import check_script, fill
from mmfree_jax.places import Place, check_local

_OLDEST_PYTHON = (3, 11)
_UV = "0.9.5"


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
    queued: bool = False
    """Wait in Google's queue for the machines (queued resources)."""
    spot: bool = False
    """Spot machines, which are taken away; `SCRIPT keep` makes them anew and resumes."""


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
    # The TPU images of Ubuntu 22.04 have Python 3.10, which is too old; others may lack ensurepip.
    python = (
        "test -x mmfree/bin/pip || "
        f"{{ python3 -c 'import sys; sys.exit(sys.version_info < {_OLDEST_PYTHON})' "
        "&& python3 -m venv mmfree; } || "
        f"{{ rm -rf mmfree && curl -LsSf https://astral.sh/uv/{_UV}/install.sh | sh "
        "&& ~/.local/bin/uv venv -q --seed --python 3.12 mmfree; }"
    )
    setup = (
        f"sudo apt-get install -y -q nfs-common && sudo mkdir -p {mount} && "
        f"(mountpoint -q {mount} || sudo mount {nfs} {mount}) && "
        f"({python}) && mmfree/bin/pip install -q {shlex.quote(values.package or '')}"
    )
    run = shlex.join(["mmfree/bin/mmfree", "train", *train])
    inner = f"{run} & echo $! > mmfree.pid; wait $!; echo $? > mmfree.code"
    start = f"rm -f mmfree.code; nohup sh -c {shlex.quote(inner)} > mmfree.log 2>&1 < /dev/null &"
    quoted = ("name", "project", "zone", "accelerator_type", "runtime_version")
    return {name: shlex.quote(getattr(values, name)) for name in quoted} | {
        "spot": "--spot" if values.spot else "",
        "queued": "yes" if values.queued else "no",
        "setup_command": shlex.quote(setup),
        "train_command": shlex.quote(start),
    }

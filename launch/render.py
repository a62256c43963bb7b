"""Job files for SLURM, TPU VMs and GKE from a handful of values, checked before they are used."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmfree_jax.config_io import parse_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.xla_flags import OVERLAP
from mmfree_jax.places import Place, check_local
from mmfree_jax.ranges import Count, CountOrZero, check_numbers

_TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A SLURM cluster with GPUs: one process a GPU."""

    name: str | None = None
    """Name of the job."""
    nodes: Count | None = None
    """Number of nodes."""
    gpus_per_node: Count = 8
    """GPUs of each node."""
    cpus_per_gpu: Count = 8
    """Cores for each process."""
    time: str = "24:00:00"
    """Time limit; when it is over the job saves, and is put back in the queue."""
    partition: str | None = None
    """Partition; None: the cluster's default."""
    account: str | None = None
    """Account; None: your default."""
    setup: str = ""
    """Shell line that makes `mmfree` available, such as: source /shared/venv/bin/activate."""
    restarts: CountOrZero = 100
    """How often the job may go back into the queue by itself."""


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


@dataclasses.dataclass(frozen=True)
class Gke:
    """A JobSet on Google Kubernetes Engine: one process a host, TPU slices or GPU hosts."""

    name: str | None = None
    """Name of the JobSet."""
    image: str | None = None
    """Container image with mmfree installed."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) for data and runs."""
    mount: Place = "/mnt/shared"
    """Where it is mounted."""
    accelerator: str | None = None
    """The nodes' accelerator label, such as tpu-v5-lite-podslice or nvidia-h100-80gb."""
    topology: str | None = None
    """TPU: the nodes' topology label, such as 16x16."""
    hosts: Count | None = None
    """Hosts of a slice, or GPU hosts."""
    devices_per_host: Count | None = None
    """TPU chips or GPUs of each host."""
    slices: Count = 1
    """TPU: slices, joined by the data centre's network."""
    restarts: CountOrZero = 100
    """How often all start again after a failure."""


PLATFORMS: dict[str, type] = {"slurm": Slurm, "tpu-vm": TpuVm, "gke": Gke}


def render(values: Any, train: Sequence[str]) -> str:
    """The job file for `values` that runs `mmfree train` with the arguments `train`.

    Raises:
      ConfigError: a value is missing or malformed, or the result does not pass its check.
    """
    platform = next(name for name, kind in PLATFORMS.items() if isinstance(values, kind))
    require_values(values, platform)
    if not train:
        raise ConfigError("no arguments for mmfree train: give them after --")
    if isinstance(values, Slurm):
        text = fill("slurm.sbatch", _slurm(values, train))
        check_script(text)
    elif isinstance(values, TpuVm):
        text = fill("tpu-vm.sh", _tpu_vm(values, train))
        check_script(text)
    else:
        text = fill("gke.yaml", _gke(values, train))
        check_jobset(text)
    return text


def check_run_dir(values: Any, run_dir: str) -> None:
    """Refuses a run directory that vanishes with the machine it is on.

    Raises:
      ConfigError: on TPU VMs and GKE, run_dir is not in the folder that all hosts mount.
    """
    mount = getattr(values, "mount", None)
    if mount is None:
        return  # a cluster's nodes share what the user's shell sees
    if not PurePosixPath(run_dir).is_relative_to(mount) or ".." in PurePosixPath(run_dir).parts:
        raise ConfigError(
            f"run_dir is {run_dir!r}, outside of mount ({mount}): the hosts would not share it, "
            f"and checkpoints would be lost with them; give --run-dir {mount}/NAME behind --"
        )


def fill(name: str, values: dict[str, Any]) -> str:
    """A template with `values` in its places."""
    text = (_TEMPLATES / name).read_text(encoding="utf-8")
    return re.sub(r"@\{(\w+)\}", lambda match: str(values[match[1]]), text)


def require_values(values: Any, platform: str) -> None:
    """Refuses values that are missing, out of range, or of more than one line.

    Raises:
      ConfigError: names them.
    """
    optional = {"partition", "account", "topology"}
    missing = [
        field.name
        for field in dataclasses.fields(values)
        if getattr(values, field.name) in (None, "") and field.name not in optional | {"setup"}
    ]
    if missing:
        raise ConfigError(
            f"{platform} needs {', '.join(missing)}: give "
            f"{', '.join('--' + name.replace('_', '-') for name in missing)}, or a --values file"
        )
    check_numbers(values)
    if "://" in (nfs := getattr(values, "nfs", None) or ""):  # elsewhere HOST:/VOLUME
        check_local(nfs, "nfs")
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if isinstance(value, str) and ("\n" in value or "\0" in value):
            raise ConfigError(f"{field.name} is {value!r}: give one line")


def plain(name: str, value: str, pattern: str = r"[\w.:/@%+-]+") -> str:
    """A value that stands where nothing can be quoted."""
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{name} is {value!r}: use letters, digits and . : / @ % + - _ only")
    return value


def partition_and_account(partition: str | None, account: str | None) -> str:
    """The directives of those that are given."""
    given = (("partition", partition), ("account", account))
    return "".join(f"#SBATCH --{name}={plain(name, value)}\n" for name, value in given if value)


def _slurm(values: Slurm, train: Sequence[str]) -> dict[str, Any]:
    return {
        "name": plain("name", values.name or ""),
        "nodes": values.nodes,
        "gpus_per_node": values.gpus_per_node,
        "cpus_per_gpu": values.cpus_per_gpu,
        "time": plain("time", values.time, r"[\d:-]+"),
        "optional_directives": partition_and_account(values.partition, values.account),
        "setup": values.setup or ":",
        "xla_flags": shlex.quote(" ".join(OVERLAP)),
        "command": shlex.join(["mmfree", "train", *train]),
        "restarts": values.restarts,
    }


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


def _gke(values: Gke, train: Sequence[str]) -> dict[str, Any]:
    is_tpu = (values.accelerator or "").startswith("tpu")
    if is_tpu and not values.topology:
        raise ConfigError(f"{values.accelerator} needs its topology: give --topology, such as 4x4")
    if not is_tpu and values.slices != 1:
        raise ConfigError(f"slices is {values.slices}: GPU hosts count as hosts, set --slices 1")
    name = plain("name", values.name or "", r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
    if is_tpu:  # GKE tells TPU processes who they are
        selector = {
            "cloud.google.com/gke-tpu-accelerator": values.accelerator,
            "cloud.google.com/gke-tpu-topology": values.topology,
        }
        limits, env = {"google.com/tpu": values.devices_per_host}, []
    else:
        selector = {"cloud.google.com/gke-accelerator": values.accelerator}
        limits = {"nvidia.com/gpu": values.devices_per_host}
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        env = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-train-0-0.{name}:8476"},
            {"name": "JAX_NUM_PROCESSES", "value": str(values.hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            {"name": "XLA_FLAGS", "value": " ".join(OVERLAP)},
        ]
    filled = {
        "name": name,
        "image": values.image,
        "claim": values.claim,
        "mount": values.mount,
        "hosts": values.hosts,
        "slices": values.slices,
        "restarts": values.restarts,
        "node_selector": selector,
        "limits": limits,
        "env": env,
        "command": ["mmfree", "train", *train],
    }
    return {key: json.dumps(value) for key, value in filled.items()}  # JSON is YAML


def check_script(text: str) -> None:
    """Has bash read a script without running it.

    Raises:
      ConfigError: it is not a valid script, which `setup` alone can make it.
    """
    bash = shutil.which("bash")
    if bash is None:
        return
    done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise ConfigError(f"the rendered script is not valid: {reason}; see the value of setup")


def check_jobset(text: str) -> None:
    """Parses a JobSet and checks that its fields are where Kubernetes looks for them.

    Raises:
      ConfigError: it does not parse, or a field is missing.
    """
    try:
        job = parse_yaml(text, "the rendered JobSet")
        replicated = job["spec"]["replicatedJobs"][0]
        spec = replicated["template"]["spec"]
        pod = spec["template"]["spec"]
        container = pod["containers"][0]
        found = {
            "kind": job["kind"] == "JobSet",
            "apiVersion": job["apiVersion"].startswith("jobset.x-k8s.io/"),
            "metadata.name": isinstance(job["metadata"]["name"], str),
            "replicas": replicated["replicas"] >= 1,
            "parallelism": spec["parallelism"] == spec["completions"],
            "completionMode": spec["completionMode"] == "Indexed",
            "restartPolicy": pod["restartPolicy"] == "Never",
            "nodeSelector": all(isinstance(v, str) for v in pod["nodeSelector"].values()),
            "command": all(isinstance(word, str) for word in container["command"]),
            "image": isinstance(container["image"], str),
            "limits": bool(container["resources"]["limits"]),
            "volumes": container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"],
        }
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ConfigError(f"the rendered JobSet is not valid: {' '.join(str(e).split())}") from e
    wrong = [name for name, good in found.items() if not good]
    if wrong:
        raise ConfigError(f"the rendered JobSet is not valid: see {', '.join(wrong)}")

"""A JobSet on Google Kubernetes Engine."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmfree_jax.config_io import parse_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.jobs.fields import plain, require
from mmfree_jax.launch.jobs.gke_network import Network, pod_parts
from mmfree_jax.launch.jobs.template import fill, one_line_yaml, without_empty
from mmfree_jax.launch.xla_flags import OVERLAP
from mmfree_jax.places import Place
from mmfree_jax.ranges import Count, CountOrZero

_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "use a to z, digits and . - only"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", "give the nodes' label"
_AMOUNT = r"\d+(\.\d+)?(Ki|Mi|Gi|Ti)", "give a number and Ki, Mi, Gi or Ti, as in 64Gi"
_FORMS: Mapping[str, tuple[str, str]] = {
    # Pods are called NAME-train-SLICE-HOST-xxxxx, and the service that finds them NAME.
    "name": (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "use at most 40 of a to z, digits and -, a first"),
    "image": (r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*", "give REGISTRY/NAME:TAG"),
    "claim": _NAME,
    "service_account": _NAME,
    "mount": (r"/[^:]*", "give a folder from /, without a colon"),
    "accelerator": _LABEL,
    "topology": (r"\d+x\d+(x\d+)?", "give the nodes' label, as in 16x16"),
    "cpu": (r"\d+(\.\d+)?m?", "give a number of cores, as in 96"),
    "memory": _AMOUNT,
    "shm": _AMOUNT,
    "queue": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "use a to z, digits and - only"),
}


@dataclasses.dataclass(frozen=True)
class Gke:
    """A JobSet on Google Kubernetes Engine: one process a host, TPU slices or GPU hosts."""

    name: str | None = None
    """Name of the JobSet."""
    image: str | None = None
    """Container image with mmfree installed."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) for data and runs; None: they are in buckets."""
    mount: Place = "/mnt/shared"
    """Where it is mounted."""
    service_account: str | None = None
    """Kubernetes service account that may use the buckets; None: the namespace's default."""
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
    cpu: str | None = None
    """Cores that each pod asks for, such as 96; None: none are kept for it."""
    memory: str | None = None
    """Memory that each pod asks for, such as 800Gi; None: the first to go where it is short."""
    shm: str | None = None
    """Size of /dev/shm, which counts as the pod's memory; None: half of the host's."""
    network: Network | None = None
    """GPU: the hosts' fast network: tcpx (a3-highgpu), tcpxo (a3-megagpu), rdma (a3-ultragpu, a4);
    None: only eth0."""
    queue: str | None = None
    """Kueue's local queue; None: without Kueue."""
    spot: bool = False
    """On spot machines, which are taken away at half a minute's notice."""
    restarts: CountOrZero = 100
    """How often all start again after a failure."""


def render_gke(values: Gke, train: Sequence[str]) -> str:
    """The JobSet whose pods run `mmfree train` with `train`.

    Raises:
      ConfigError: a value is missing or malformed.
    """
    require(values, "gke", "name", "image", "mount", "accelerator", "hosts", "devices_per_host")
    for field, form in _FORMS.items():
        if getattr(values, field) is not None:
            plain(field, getattr(values, field), *form)
    is_tpu = (values.accelerator or "").startswith("tpu")
    if is_tpu and not values.topology:
        raise ConfigError(f"{values.accelerator} needs its topology: give --topology, such as 4x4")
    if is_tpu and values.network:
        raise ConfigError(f"network is {values.network!r}: TPUs have their own, leave it out")
    if not is_tpu and values.slices != 1:
        raise ConfigError(f"slices is {values.slices}: GPU hosts count as hosts, set --slices 1")
    if values.network and values.devices_per_host != 8:
        raise ConfigError(
            f"devices_per_host is {values.devices_per_host}: hosts with network "
            f"{values.network} have 8 GPUs, set --devices-per-host 8"
        )
    text = without_empty(fill("gke.yaml", _gke(values, train, is_tpu)))
    check_jobset(text)
    return text


def _gke(values: Gke, train: Sequence[str], is_tpu: bool) -> dict[str, Any]:
    parts = pod_parts(values.network)
    device = "google.com/tpu" if is_tpu else "nvidia.com/gpu"
    asked = {"cpu": values.cpu, "memory": values.memory}
    resources = {
        "requests": {name: amount for name, amount in asked.items() if amount},
        "limits": {device: values.devices_per_host},
    }
    hosts = {name: host for name, (host, _) in parts.folders.items()} | parts.more_volumes
    shm = {"medium": "Memory"} | ({"sizeLimit": values.shm} if values.shm else {})
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": shm},
        *({"name": name, "hostPath": {"path": path}} for name, path in hosts.items()),
    ]
    mounts = {"shm": "/dev/shm"} | {name: seen for name, (_, seen) in parts.folders.items()}
    if values.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": values.claim}})
        mounts["shared"] = values.mount
    spot = {"cloud.google.com/gke-spot": "true"}
    tolerations = [
        {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
        for key, value in spot.items()
    ]
    # Kubernetes puts variables in the place of $(NAME) and makes one dollar of two.
    command = [word.replace("$", "$$") for word in ("mmfree", "train", *train)]
    if parts.profile:
        command = ["bash", "-c", f'source {parts.profile} && exec "$$@"', "bash", *command]
    filled = {
        "name": values.name,
        "labels": {"kueue.x-k8s.io/queue-name": values.queue} if values.queue else {},
        "restarts": values.restarts,
        "slices": values.slices,
        "hosts": values.hosts,
        "pod_metadata": {"annotations": parts.annotations} if parts.annotations else {},
        "service_account": values.service_account,
        "node_selector": _selector(values, is_tpu) | (spot if values.spot else {}),
        "tolerations": tolerations if values.spot else [],
        "init_containers": [parts.daemon] if parts.daemon else [],
        "image": values.image,
        "command": command,
        "env": _environment(values, is_tpu) + [
            {"name": name, "value": value} for name, value in parts.env.items()
        ],
        "resources": {name: amounts for name, amounts in resources.items() if amounts},
        "volume_mounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
        "volumes": volumes,
    }  # fmt: skip
    return {key: one_line_yaml(value) for key, value in filled.items()}


def _selector(values: Gke, is_tpu: bool) -> dict[str, str | None]:
    if is_tpu:
        return {
            "cloud.google.com/gke-tpu-accelerator": values.accelerator,
            "cloud.google.com/gke-tpu-topology": values.topology,
        }
    return {"cloud.google.com/gke-accelerator": values.accelerator}


def _environment(values: Gke, is_tpu: bool) -> list[dict[str, Any]]:
    """How the processes find each other; GKE tells those on TPUs."""
    if is_tpu:
        return []
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{values.name}-train-0-0.{values.name}:8476"},
        {"name": "JAX_NUM_PROCESSES", "value": str(values.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "XLA_FLAGS", "value": " ".join(OVERLAP)},
    ]


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
            "volumes": {m["name"] for m in container["volumeMounts"]}
            <= {volume["name"] for volume in pod["volumes"]},
        }
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ConfigError(f"the rendered JobSet is not valid: {' '.join(str(e).split())}") from e
    wrong = [name for name, good in found.items() if not good]
    if wrong:
        raise ConfigError(f"the rendered JobSet is not valid: see {', '.join(wrong)}")

"""A JobSet on Google Kubernetes Engine."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from mmfree_jax.config_io import parse_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.jobs.fields import plain, require
from mmfree_jax.launch.jobs.template import fill
from mmfree_jax.launch.xla_flags import OVERLAP
from mmfree_jax.places import Place
from mmfree_jax.ranges import Count, CountOrZero


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


def render_gke(values: Gke, train: Sequence[str]) -> str:
    """The JobSet whose pods run `mmfree train` with `train`.

    Raises:
      ConfigError: a value is missing or malformed.
    """
    require(values, "gke", "name", "image", "claim", "mount", "accelerator", "hosts",
            "devices_per_host")  # fmt: skip
    text = fill("gke.yaml", _gke(values, train))
    check_jobset(text)
    return text


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

"""A managed job of SkyPilot, on whichever cloud has the machines: one process a node."""

import dataclasses
import re
import shlex
from collections.abc import Sequence

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.jobs.fields import plain, require
from mmfree_jax.launch.jobs.template import check_script, fill, one_line_yaml, without_empty
from mmfree_jax.launch.xla_flags import OVERLAP
from mmfree_jax.places import Place
from mmfree_jax.ranges import Count

_FORMS = {
    "name": (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "use at most 40 of a to z, digits and -, a first"),
    "accelerators": (r"[A-Za-z][A-Za-z0-9.-]*:[1-9]\d{0,2}", "give NAME:COUNT, as in H100:8"),
    "infra": (
        r"[A-Za-z0-9*]+(/[A-Za-z0-9*._:@-]+)*",
        "give CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE",
    ),
    "image": (r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*", "give REGISTRY/NAME:TAG"),
    "bucket": (r"(gs|s3|r2)://[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", "give gs://NAME or s3://NAME"),
    "mount": (r"/[^:]*", "give a folder from /, without a colon"),
}


@dataclasses.dataclass(frozen=True)
class Sky:
    """SkyPilot, on any of its clouds: one process a node, which drives all its GPUs."""

    name: str | None = None
    """Name of the job."""
    accelerators: str | None = None
    """GPUs of each node, such as H100:8."""
    nodes: Count = 1
    """Number of nodes."""
    infra: str | None = None
    """Where: a cloud, or cloud/region/zone, such as gcp/us-central1; None: the cheapest."""
    image: str | None = None
    """Container image with mmfree installed; None: the machine, which setup prepares."""
    setup: str = ""
    """Shell line that makes `mmfree` available, such as: pip install /mnt/shared/mmfree.whl."""
    bucket: str | None = None
    """Bucket that all nodes mount for data and runs, such as gs://mine; None: both are given by
    URL."""
    mount: Place = "/mnt/shared"
    """Where it is mounted."""
    spot: bool = False
    """Spot machines, which are taken away; the job goes on elsewhere."""


def render_sky(values: Sky, train: Sequence[str]) -> str:
    """The task whose nodes run `mmfree train` with `train`.

    Raises:
      ConfigError: a value is missing or malformed.
    """
    require(values, "sky", "name", "accelerators", "mount")
    for field, form in _FORMS.items():
        if getattr(values, field) is not None:
            plain(field, getattr(values, field), *form)
    if not values.image and not values.setup:
        raise ConfigError(
            "setup is empty and no image is given: give --setup with the line that installs "
            "mmfree, or --image"
        )
    run = "\n".join([
        "set -eu",
        f"export XLA_FLAGS={shlex.quote(' '.join(OVERLAP))}",
        'if [ "$SKYPILOT_NUM_NODES" -gt 1 ]; then',
        '  first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        '  export JAX_COORDINATOR_ADDRESS="$first:8476"',
        "  export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK",
        "fi",
        "exec " + shlex.join(["mmfree", "train", *train]),
    ])  # fmt: skip
    check_script(values.setup)
    check_script(run)
    filled = {
        "name": values.name,
        "nodes": values.nodes,
        "accelerators": values.accelerators,
        "infra": values.infra,
        "image_id": f"docker:{values.image}" if values.image else None,
        "spot": values.spot,
        "file_mounts": {values.mount: {"source": values.bucket, "mode": "MOUNT"}}
        if values.bucket
        else {},
        "setup": values.setup or None,
    }
    texts = {key: one_line_yaml(value) for key, value in filled.items()}
    return without_empty(fill("sky.yaml", texts | {"run": _script(run)}))


def _script(text: str) -> str:
    """A script as YAML: line by line where it can be read so, else in one."""
    if re.search(r"[^\n -~\u00a0-\ud7ff\ue000-\ufdff]|\u2028|\u2029|\n\s*\n|\n$", text):
        return one_line_yaml(text)
    return "|-\n" + "\n".join(f"  {line}" for line in text.split("\n"))

"""Devices that are not here: by name, for JAX's compilers, with what their data sheets say."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from mmfree_jax.errors import ConfigError
from mmfree_jax.train.flops import Device, find_device


@dataclasses.dataclass(frozen=True)
class Links:
    """How fast a chip talks to the others, bytes a second in one direction."""

    near: float
    """All links of a chip within its host (GPU) or slice (TPU)."""
    far: float
    """A chip's share of the network between hosts or slices."""


# near: NVLink's total halved (NVIDIA data sheets: A100 600, H100, H200 and H800's siblings 900,
# B200 1800 GB/s both ways); TPU: "interchip interconnect bandwidth" of the Cloud TPU system
# architecture pages (v4 2400, v5e 1600, v5p 4800, v6e 3584 Gbps a chip, both ways), halved.
# far: one 400 Gb/s adapter a GPU (A100: 200) as in NVIDIA's DGX; TPU: a host's 200 Gb/s for
# four chips.
_LINKS = {
    "a100": Links(300e9, 25e9),
    "h100": Links(450e9, 50e9),
    "h200": Links(450e9, 50e9),
    "b200": Links(900e9, 50e9),
    "v4": Links(150e9, 6.25e9),
    "v5e": Links(100e9, 6.25e9),
    "v5p": Links(300e9, 6.25e9),
    "v6e": Links(224e9, 6.25e9),
}
_KINDS = {"v4": "tpu v4", "v5e": "tpu v5e", "v5p": "tpu v5", "v6e": "tpu v6"}
_CORES = {"v4", "v5p"}  # their sizes count cores, two a chip

# What XLA asks a GPU about itself: compute capability, multiprocessors, shared memory of a
# block, L2 in MiB. The memory and its bandwidth come from the table of devices.
_GPUS = {
    "a100": ("8.0", 108, 166912, 40, "NVIDIA A100-SXM4-80GB"),
    "h100": ("9.0", 132, 232448, 50, "NVIDIA H100 80GB HBM3"),
    "h200": ("9.0", 132, 232448, 50, "NVIDIA H200"),
}
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices: `v5e-256`, `2xv5e-256`, `h100x8`, `h100x8x16`, `cpu:8`."""

    text: str
    chip: str
    """Key of the tables above, or "cpu"."""
    groups: int
    """Slices (TPU) or hosts (GPU), with the slower network between them."""
    each: int
    """Devices of each."""

    @property
    def count(self) -> int:
        """All devices."""
        return self.groups * self.each

    @property
    def platform(self) -> str:
        """JAX's name: tpu, gpu or cpu."""
        return "cpu" if self.chip == "cpu" else "tpu" if self.chip in _KINDS else "gpu"

    @property
    def device(self) -> Device | None:
        """The data sheet; None for a CPU."""
        return find_device(_KINDS.get(self.chip, self.chip))

    @property
    def near_network(self) -> str:
        """What joins the devices of a slice or host."""
        return {"tpu": "ICI", "gpu": "NVLink"}.get(self.platform, "the host's memory")

    @property
    def far_network(self) -> str:
        """What joins slices or hosts."""
        return {"tpu": "DCN", "gpu": "InfiniBand"}.get(self.platform, "the network")

    @property
    def links(self) -> Links | None:
        """The links' rates; None for a CPU."""
        return _LINKS.get(self.chip)


def parse_topology(text: str) -> Topology:
    """A topology from its name.

    Raises:
      ConfigError: it is unknown or malformed.
    """
    if match := re.fullmatch(r"cpu:(\d+)", text):
        chip, groups, each = "cpu", 1, int(match[1])
    elif match := re.fullmatch(r"(?:(\d+)x)?(v4|v5e|v5p|v6e)-(\d+)", text):
        chip, groups = match[2], int(match[1] or 1)
        each = int(match[3]) // 2 if chip in _CORES else int(match[3])
        if each:
            _tpu_shape(chip, each)
    elif match := re.fullmatch(r"([a-z]+\d+)x(\d+)(?:x(\d+))?", text):
        chip, each, groups = match[1], int(match[2]), int(match[3] or 1)
    else:
        chip, groups, each = "", 0, 0
    if chip not in ("cpu", *_KINDS, *_GPUS) or not groups * each:
        raise ConfigError(
            f"topology is {text!r}: give v5e-256 (or v4-, v5p-, v6e-), 2xv5e-256 for slices, "
            f"{'x8, '.join(_GPUS)}x8 (or h100x8x16 for 16 hosts), or cpu:8"
        )
    return Topology(text, chip, groups, each)


def _tpu_shape(chip: str, count: int) -> tuple[int, ...]:
    """The chips of a slice as a grid, as near to a square or cube as it is sold.

    Raises:
      ConfigError: there is no such slice.
    """
    size = int(math.log2(count)) if count else -1
    if count < 4 or 2**size != count or (chip in ("v5e", "v6e") and count > 256):
        raise ConfigError(
            f"topology is {chip} of {count} chips: choose a power of two from 4"
            + (" to 256" if chip in ("v5e", "v6e") else "")
        )
    if chip in ("v5e", "v6e"):
        return (2 ** (size // 2), 2 ** (size - size // 2))
    sides = sorted(size // 3 + (1 if i < size % 3 else 0) for i in range(3))
    return tuple(2**side for side in sides) if count > 4 else (2, 2, 1)


def prepare(topology: Topology) -> bool:
    """Readies the environment before JAX starts; returns whether the devices are simulated.

    Where the compiler for a topology is not installed, CPU devices stand in: shapes, shardings
    and collectives come out alike, memory and speed do not.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is taken: others may compile too
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    simulated = missing_compiler(topology) is not None
    if simulated or topology.platform == "cpu":
        flag = "--xla_force_host_platform_device_count"
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
        os.environ["XLA_FLAGS"] = " ".join([*flags, f"{flag}={topology.count}"])
    return simulated


def missing_compiler(topology: Topology) -> str | None:
    """What to install for a topology; None if it is there."""
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "pip install 'jax[tpu]'"
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    if topology.platform == "gpu" and not any(map(importlib.util.find_spec, plugins)):
        return "pip install 'jax[cuda12]' (or make aot)"
    return None


def make_devices(topology: Topology, simulated: bool) -> list[Any]:
    """The topology's devices, for a mesh; nothing can run on them unless simulated.

    Raises:
      ConfigError: the compiler refuses the topology.
    """
    import jax
    from jax.experimental import topologies

    if simulated or topology.platform == "cpu":
        return jax.devices("cpu")[: topology.count]
    try:
        if topology.platform == "tpu":
            shape = "x".join(map(str, _tpu_shape(topology.chip, topology.each)))
            slices = {"num_slices": topology.groups} if topology.groups > 1 else {}
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{topology.chip}:{shape}", **slices
            )
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=_gpu_target(topology),
                topology=f"{topology.groups}x1x{topology.each}",
            )
    except Exception as e:  # the compilers raise many kinds
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"topology is {topology.text!r}: its compiler says {reason}") from e
    return list(found.devices)


def _gpu_target(topology: Topology) -> str:
    capability, cores, shared, l2, name = _GPUS[topology.chip]
    device = topology.device
    assert device is not None
    major, minor = capability.split(".")
    return _GPU_TARGET.format(
        cores=cores,
        bandwidth=int(device.memory_bandwidth),
        l2=l2 * 2**20,
        memory=int(device.memory_gib * 1e9 * 1.06),
        shared=shared,
        major=major,
        minor=minor,
        name=name,
    )


@contextlib.contextmanager
def as_if_on(devices: list[Any]) -> Iterator[None]:
    """Lets code that asks JAX what it runs on hear of `devices`, while it is traced."""
    import jax

    platform = devices[0].platform
    answers: dict[str, Any] = {
        "default_backend": lambda: "gpu" if platform == "cuda" else platform,
        "devices": lambda *_: list(devices),
        "device_count": lambda *_: len(devices),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(jax, name, answer))
        yield

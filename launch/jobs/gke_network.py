"""What pods on Google's GPU hosts need to reach each other by the fast network cards.

The hosts' own daemons and libraries come from Google's images and installers; names of volumes,
devices and variables follow https://cloud.google.com/kubernetes-engine/docs/how-to and the
decorators of https://github.com/AI-Hypercomputer/xpk. None was tried on such a host here.
"""

import dataclasses
import json
from typing import Any, Literal

Network = Literal["tcpx", "tcpxo", "rdma"]

_LIBRARIES = "/usr/local/nvidia"
_DEVICES = (*(f"/dev/nvidia{i}" for i in range(8)), "/dev/nvidiactl", "/dev/nvidia-uvm")
# GPUDirect-TCPX has no profile to source: these are the values of its guide, for a3-highgpu-8g,
# whose cards lie on these cores.
_TCPX_ENV = {
    "NCCL_SOCKET_IFNAME": "eth0",
    "NCCL_GPUDIRECTTCPX_CTRL_DEV": "eth0",
    "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": "eth1,eth2,eth3,eth4",
    "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX": "/run/tcpx",
    "NCCL_GPUDIRECTTCPX_TX_BINDINGS": (
        "eth1:8-21,112-125;eth2:8-21,112-125;eth3:60-73,164-177;eth4:60-73,164-177"
    ),
    "NCCL_GPUDIRECTTCPX_RX_BINDINGS": (
        "eth1:22-35,126-139;eth2:22-35,126-139;eth3:74-87,178-191;eth4:74-87,178-191"
    ),
    "NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS": "500000",
    "NCCL_GPUDIRECTTCPX_FORCE_ACK": "0",
    "NCCL_CROSS_NIC": "0",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_NET_GDR_LEVEL": "PIX",
    "NCCL_P2P_PXN_LEVEL": "0",
    "NCCL_NSOCKS_PERTHREAD": "4",
    "NCCL_SOCKET_NTHREADS": "1",
    "NCCL_DYNAMIC_CHUNK_SIZE": "524288",
    "NCCL_P2P_NET_CHUNKSIZE": "524288",
    "NCCL_P2P_PCI_CHUNKSIZE": "524288",
    "NCCL_P2P_NVL_CHUNKSIZE": "1048576",
    "NCCL_BUFFSIZE": "4194304",
}


@dataclasses.dataclass(frozen=True)
class PodParts:
    """What a network adds to a pod."""

    annotations: dict[str, str] = dataclasses.field(default_factory=dict)
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables of the training container."""
    profile: str | None = None
    """Script of the host that sets NCCL's variables; sourced before the command."""
    folders: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """By the volume's name: a folder of the host, and where the training container sees it."""
    more_volumes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Folders of the host for the daemon alone."""
    daemon: dict[str, Any] | None = None
    """A container beside the training one, which ends with it."""


def pod_parts(network: Network | None) -> PodParts:
    """What pods with this network have; nothing for None."""
    if network == "tcpx":
        return PodParts(
            annotations=_interfaces("default", *(f"vpc{i}" for i in range(1, 5)))
            | _devices("tcpx-daemon", _DEVICES),
            env={"LD_LIBRARY_PATH": f"{_LIBRARIES}/lib64"} | _TCPX_ENV,
            folders={
                "libraries": ("/home/kubernetes/bin/nvidia", _LIBRARIES),
                "tcpx-socket": ("/run/tcpx", "/run/tcpx"),
            },
            more_volumes={"sys": "/sys", "proc-sys": "/proc/sys"},
            daemon=_daemon(
                "tcpx",
                "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpx/tcpgpudmarxd-dev:v2.0.11",
                ["/tcpgpudmarxd/build/app/tcpgpudmarxd", "--gpu_nic_preset", "a3vm",
                 "--gpu_shmem_type", "fd", "--uds_path", "/run/tcpx",
                 "--setup_param", "--verbose 128 2 0 "],
                ["NET_ADMIN"],
                {"tcpx-socket": "/run/tcpx"},
            ),
        )  # fmt: skip
    if network == "tcpxo":
        return PodParts(
            annotations=_interfaces("default", *(f"vpc{i}" for i in range(1, 9)))
            | _devices("tcpxo-daemon", (*_DEVICES, "/dev/dmabuf_import_helper")),
            env={
                "LD_LIBRARY_PATH": f"{_LIBRARIES}/lib64",
                "NCCL_LIB_DIR": f"{_LIBRARIES}/lib64",
                "NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY": "/dev/aperture_devices",
            },
            profile=f"{_LIBRARIES}/lib64/nccl-env-profile.sh",
            folders={
                "libraries": ("/home/kubernetes/bin/nvidia", _LIBRARIES),
                "aperture-devices": ("/dev/aperture_devices", "/dev/aperture_devices"),
            },
            more_volumes={"sys": "/sys", "proc-sys": "/proc/sys"},
            daemon=_daemon(
                "tcpxo",
                "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpxo/tcpgpudmarxd-dev:v1.0.12",
                ["/bin/sh", "-c",
                 "chmod 755 /fts/entrypoint_rxdm_container.sh && exec "
                 "/fts/entrypoint_rxdm_container.sh --num_hops=2 --num_nics=8 --uid= "
                 "--alsologtostderr"],
                ["NET_ADMIN", "NET_BIND_SERVICE"],
                {},
            ),
        )  # fmt: skip
    if network == "rdma":
        return PodParts(
            annotations=_interfaces("default", "gvnic-1", *(f"rdma-{i}" for i in range(8))),
            env={"LD_LIBRARY_PATH": f"/usr/local/gib/lib64:{_LIBRARIES}/lib64"},
            profile="/usr/local/gib/scripts/set_nccl_env.sh",
            folders={
                "libraries": ("/home/kubernetes/bin/nvidia", _LIBRARIES),
                "gib": ("/home/kubernetes/bin/gib", "/usr/local/gib"),
            },
        )
    return PodParts()


def _interfaces(*networks: str) -> dict[str, str]:
    """The pod's network cards, by the names that the guides give the cluster's networks."""
    cards = [{"interfaceName": f"eth{i}", "network": name} for i, name in enumerate(networks)]
    return {
        "networking.gke.io/default-interface": "eth0",
        "networking.gke.io/interfaces": json.dumps(cards),
    }


def _devices(container: str, paths: tuple[str, ...]) -> dict[str, str]:
    return {f"devices.gke.io/container.{container}": "".join(f"- path: {p}\n" for p in paths)}


def _daemon(
    name: str, image: str, command: list[str], capabilities: list[str], mounts: dict[str, str]
) -> dict[str, Any]:
    mounts = {"libraries": _LIBRARIES, "sys": "/hostsysfs", "proc-sys": "/hostprocsysfs"} | mounts
    return {
        "name": f"{name}-daemon",
        "image": image,
        "restartPolicy": "Always",  # among initContainers: it stays, and ends with the others
        "command": command,
        "securityContext": {"capabilities": {"add": capabilities}},
        "env": [{"name": "LD_LIBRARY_PATH", "value": f"{_LIBRARIES}/lib64"}],
        "volumeMounts": [{"name": n, "mountPath": path} for n, path in mounts.items()],
    }

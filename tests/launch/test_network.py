"""Two processes in network namespaces of their own, and the cable between them pulled."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from mmfree_jax.config_io import dump_yaml
from mmfree_jax.launch.local import mmfree_command
from mmfree_jax.parallel.processes import EXIT_LOST
from mmfree_jax.saved.manifest import checkpoint_steps

pytestmark = pytest.mark.slow

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable; skips where these may not be made."""
    names = [f"mmfree{os.getpid()}-{i}" for i in range(2)]
    links = [f"mm{os.getpid() % 10**6}-{i}" for i in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces are not allowed here: {e.stderr.decode().strip()}")
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", link, "up")
            folder = Path("/etc/netns") / name  # Gloo listens where the host's name leads
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            )
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def test_each_side_of_a_broken_network_names_the_other_and_leaves(
    hosts, pod_config, pod_environment, tmp_path
):
    config, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(dump_yaml(pod_config))
    argv = ["train", "--config", str(config), "--run-dir", str(run_dir), "--steps", "100000"]
    argv += ["--processes.beat-seconds", "0.5", "--processes.silent-seconds", "6"]
    processes = []
    try:
        for i, (name, _) in enumerate(hosts):
            env = pod_environment | {
                "JAX_COORDINATOR_ADDRESS": f"{ADDRESSES[0]}:7777",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            }
            command = ["ip", "netns", "exec", name, *mmfree_command(argv)]
            log = (tmp_path / f"{i}.txt").open("w")
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        while not checkpoint_steps(run_dir / "checkpoints"):
            assert all(p.poll() is None for p in processes), (tmp_path / "0.txt").read_text()
            time.sleep(0.02)
        _ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
        assert [p.wait(timeout=200) for p in processes] == [EXIT_LOST] * 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [(tmp_path / f"{i}.txt").read_text() for i in range(2)]
    assert "mmfree: error: process 1 (pid " in said[0]
    assert "is gone or stopped: no sign of life for" in said[0]
    assert "mmfree: error: process 0, the coordinator, is gone or stopped" in said[1]

"""Processes in two network namespaces: the cable between them pulled, and a slow one."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.config import CheckpointConfig, MeshConfig
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.launch.local import mmfree_command
from mmfree_jax.parallel.processes import EXIT_LOST
from mmfree_jax.saved.best import best_checkpoint
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.train.training import train

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


def _start(hosts, environment, argv, each, folder):
    """`mmfree` as `each` processes on each host; what process i writes is in <folder>/<i>.txt."""
    processes = []
    for i in range(each * len(hosts)):
        env = environment | {
            "JAX_COORDINATOR_ADDRESS": f"{ADDRESSES[0]}:7777",
            "JAX_NUM_PROCESSES": str(each * len(hosts)),
            "JAX_PROCESS_ID": str(i),
        }
        command = ["ip", "netns", "exec", hosts[i // each][0], *mmfree_command(argv)]
        with (folder / f"{i}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return processes


def _make_slow(hosts):
    """Gives the cable 10 Mb/s in each direction; skips where that is not allowed."""
    for name, link in hosts:
        shaping = ["tc", "-n", name, "qdisc", "add", "dev", link, "root"]
        shaping += ["tbf", "rate", "10mbit", "burst", "16kb", "latency", "1s"]
        try:
            subprocess.run(shaping, check=True, capture_output=True, timeout=30)
        except FileNotFoundError:
            pytest.skip("there is no tc command")
        except subprocess.CalledProcessError as e:
            pytest.skip(f"the kernel shapes no traffic: {e.stderr.decode().strip()}")


def _delayed(name, link):
    """Packets that had to wait before the cable."""
    shown = ["tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", link]
    done = subprocess.run(shown, check=True, capture_output=True, timeout=30)
    return json.loads(done.stdout)[0]["overlimits"]


def _records(run_dir):
    return {
        (r["kind"], r["step"]): r["loss"]
        for r in read_history(run_dir / "metrics.jsonl")
        if "loss" in r
    }


def test_four_processes_as_two_slices_with_a_slow_link_keep_the_losses_of_one(
    hosts, pod_config, pod_environment, tmp_path
):
    _make_slow(hosts)
    config = dataclasses.replace(
        pod_config,
        run_dir=str(tmp_path / "run"),
        steps=6,
        model=dataclasses.replace(pod_config.model, num_layers=1),
        mesh=MeshConfig(data=2, fsdp=2),  # data between the slices
        checkpoint=CheckpointConfig(keep_last=1, keep_best=1),
        eval=dataclasses.replace(pod_config.eval, every_steps=2),
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    argv = ["train", "--config", str(tmp_path / "config.yaml")]
    processes = _start(hosts, pod_environment, argv, 2, tmp_path)
    try:
        mesh = MeshConfig(data=2, fsdp=4)
        alone = dataclasses.replace(config, run_dir=str(tmp_path / "alone"), mesh=mesh)
        expected = train(alone)  # beside them: eight devices of one process
        assert [p.wait(timeout=400) for p in processes] == [0] * 4, (tmp_path / "0.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    actual = _records(tmp_path / "run")
    assert list(actual) == list(_records(tmp_path / "alone"))
    assert {("train", 6), ("eval", 2), ("eval", 6)} <= actual.keys()
    for key, loss in _records(tmp_path / "alone").items():
        np.testing.assert_allclose(actual[key], loss, rtol=2e-5, err_msg=str(key))
    assert best_checkpoint(tmp_path / "run") == expected["best"]["step"]
    assert all(_delayed(*host) for host in hosts), "nothing waited: the link was not slow"


def test_each_side_of_a_broken_network_names_the_other_and_leaves(
    hosts, pod_config, pod_environment, tmp_path
):
    config, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(dump_yaml(pod_config))
    argv = ["train", "--config", str(config), "--run-dir", str(run_dir), "--steps", "100000"]
    argv += ["--processes.beat-seconds", "0.5", "--processes.silent-seconds", "6"]
    processes = _start(hosts, pod_environment, argv, 1, tmp_path)
    try:
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

"""JobSets: what Kubernetes and JobSet take, what the pods are given, and what is refused."""

import dataclasses
import json
import re

import pytest
import yaml

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.cli.render import render_job
from mmfree_jax.launch.jobs.gke import Gke, check_jobset
from mmfree_jax.launch.render import render

# What a shell, YAML, JSON or Kubernetes could stumble over.
AWKWARD = 'o\'hara $(JAX_PROCESS_ID) $$ ${x} `x` "run"\n\U0001f600é\u2028\x85\ufeff\\n 1e3'
TRAIN = ["--preset", "1.3B", "--run-dir", f"/mnt/shared/{AWKWARD}", "--steps", "9",
         "--optimizer.learning-rate", "2e-3", "--name", "yes"]  # fmt: skip
GPU_HOSTS = Gke(
    name="mm", image="r/i:1", claim="c", accelerator="nvidia-h100-80gb", hosts=4, devices_per_host=8
)
SLICES = Gke(
    name="mm", image="r/i:1", claim="c", accelerator="tpu-v5-lite-podslice", topology="16x16",
    hosts=64, devices_per_host=4, slices=2,
)  # fmt: skip
ALL = dataclasses.replace(
    GPU_HOSTS, claim=None, cpu="96", memory="800Gi", shm="64Gi", network="tcpx", queue="research",
    spot=True, service_account="trainer",
)  # fmt: skip
JOBS = {
    "gpu": GPU_HOSTS,
    "tpu": SLICES,
    "tcpx": ALL,
    "tcpxo": dataclasses.replace(GPU_HOSTS, network="tcpxo", accelerator="nvidia-h100-mega-80gb"),
    "rdma": dataclasses.replace(GPU_HOSTS, network="rdma", accelerator="nvidia-h200-141gb"),
}

# The part that is written here of JobSet's schema: charts/jobset/crds/jobset.x-k8s.io_jobsets.yaml
# of https://github.com/kubernetes-sigs/jobset (v1alpha2); all else is refused. A job's `spec` is
# Kubernetes's own.
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required, properties):
    return {"type": "object", "required": required, "properties": properties,
            "additionalProperties": False}  # fmt: skip


JOBSET = _object(["apiVersion", "kind", "metadata", "spec"], {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": _object(["name"], {
        "name": {"type": "string"}, "labels": _TEXTS, "annotations": _TEXTS,
    }),
    "spec": _object([], {
        "failurePolicy": _object([], {
            "maxRestarts": {"type": "integer"},
            "rules": {"type": "array", "items": _object(["action", "name"], {
                "action": {
                    "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"],
                },
                "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                "onJobFailureReasons": {"type": "array", "items": {
                    "enum": ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                             "MaxFailedIndexesExceeded", "PodFailurePolicy"],
                }},
            })},
        }),
        "network": _object([], {"enableDNSHostnames": {"type": "boolean"}}),
        "replicatedJobs": {"type": "array", "items": _object(["name", "template"], {
            "name": {"type": "string"},
            "replicas": {"type": "integer"},
            "template": _object([], {"spec": {"type": "object"}}),
        })},
    }),
})  # fmt: skip


def _job(text):
    return yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]


def _pod(text):
    return _job(text)["template"]["spec"]


def _expanded(word, env):
    """What Kubernetes makes of a word of a command: $(NAME) by its value, one dollar of two."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), word)


@pytest.mark.parametrize("name", JOBS)
def test_kubernetes_and_jobset_take_them(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    jobset = yaml.safe_load(render(JOBS[name], TRAIN))
    jsonschema.validate(jobset, JOBSET)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(job, "1.30", strict=True)
    # Kubernetes's rules that no schema says.
    pod = spec["template"]["spec"]
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert len(set(volumes)) == len(volumes)
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(paths)) == len(paths)
        names = [variable["name"] for variable in container.get("env", [])]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", JOBS)
def test_every_pod_gets_the_command_as_it_was_given(name):
    container = _pod(render(JOBS[name], TRAIN))["containers"][0]
    env = {one["name"]: one.get("value", "") for one in container.get("env", [])}
    words = [_expanded(word, env) for word in container["command"]]
    assert words[words.index("mmfree") :] == ["mmfree", "train", *TRAIN]
    if name in ("tcpxo", "rdma"):  # the shell is replaced, so that SIGTERM reaches mmfree
        assert words[:2] == ["bash", "-c"]
        assert re.fullmatch(r'source /usr/local/\S+\.sh && exec "\$@"', words[2])


def test_gpu_hosts_find_each_other():
    text = render(GPU_HOSTS, TRAIN)
    job, container = _job(text), _pod(text)["containers"][0]
    assert job["parallelism"] == job["completions"] == 4
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    env = {one["name"]: one for one in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "mm-train-0-0.mm:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert "completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_tpu_slices():
    text = render(SLICES, TRAIN)
    assert yaml.safe_load(text)["spec"]["replicatedJobs"][0]["replicas"] == 2
    pod = _pod(text)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_shared_memory_and_the_volume():
    pod = _pod(render(GPU_HOSTS, TRAIN))
    assert pod["volumes"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": "c"}},
    ]
    assert pod["containers"][0]["volumeMounts"] == [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "shared", "mountPath": "/mnt/shared"},
    ]
    assert "serviceAccountName" not in pod


def test_exit_code_2_ends_the_jobset_and_every_other_end_restarts_it():
    text = render(GPU_HOSTS, TRAIN)
    assert _job(text)["podFailurePolicy"]["rules"] == [
        {"action": "FailJob",
         "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 126, 127]}},
    ]  # fmt: skip
    assert _job(text)["backoffLimit"] == 0, "any other failure ends the job, and JobSet restarts"
    policy = yaml.safe_load(text)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_all_options():
    text = render(ALL, TRAIN)
    job, pod = yaml.safe_load(text), _pod(text)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"] == [{"key": "cloud.google.com/gke-spot", "operator": "Equal",
                                   "value": "true", "effect": "NoSchedule"}]  # fmt: skip
    assert pod["containers"][0]["resources"]["requests"] == {"cpu": "96", "memory": "800Gi"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert "shared" not in volumes


@pytest.mark.parametrize(("name", "cards"), [("tcpx", 5), ("tcpxo", 9), ("rdma", 10)])
def test_pods_on_fast_networks(name, cards):
    text = render(JOBS[name], TRAIN)
    annotations = _job(text)["template"]["metadata"]["annotations"]
    interfaces = json.loads(annotations["networking.gke.io/interfaces"])
    assert [card["interfaceName"] for card in interfaces] == [f"eth{i}" for i in range(cards)]
    assert interfaces[0]["network"] == "default"
    daemons = _pod(text).get("initContainers", [])
    if name == "rdma":
        assert daemons == []
        return
    (daemon,) = daemons
    assert daemon["restartPolicy"] == "Always", "or the pod would wait for it"
    devices = yaml.safe_load(annotations[f"devices.gke.io/container.{daemon['name']}"])
    assert {"path": "/dev/nvidia7"} in devices
    assert re.search(r":v[\d.]+$", daemon["image"]), "pinned"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None, "hosts": None}, "gke needs image, hosts: give --image, --hosts, or a"),
        ({"name": "Big"}, "name is 'Big': use at most 40 of a to z"),
        ({"name": "1a"}, "name is '1a'"),  # a service's begins with a letter
        ({"name": "a" * 41}, "name is 'aaa"),
        ({"image": "a b"}, "image is 'a b': give REGISTRY/NAME:TAG"),
        ({"claim": "A_b"}, "claim is 'A_b'"),
        ({"mount": "shared"}, "mount is 'shared': give a folder from /"),
        ({"mount": "/a:b"}, "mount is '/a:b'"),
        ({"cpu": "many"}, "cpu is 'many': give a number of cores"),
        ({"memory": "800GB"}, "memory is '800GB': give a number and Ki, Mi, Gi or Ti"),
        ({"shm": "1"}, "shm is '1'"),
        ({"queue": "a b"}, "queue is 'a b'"),
        ({"service_account": "é"}, "service_account is 'é'"),
        ({"accelerator": "a b"}, "accelerator is 'a b'"),
        ({"slices": 2}, "slices is 2: GPU hosts count as hosts, set --slices 1"),
        ({"network": "rdma", "devices_per_host": 4}, "set --devices-per-host 8"),
        ({"accelerator": "tpu-v5p"}, "needs its topology: give --topology"),
        ({"accelerator": "tpu-v5p", "topology": "big"}, "topology is 'big': give the nodes' label"),
        ({"accelerator": "tpu-v5p", "topology": "4x4", "network": "rdma"}, "TPUs have their own"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        render(dataclasses.replace(GPU_HOSTS, **change), TRAIN)


def test_without_a_file_system_the_run_must_be_in_a_bucket(capsys):
    argv = ["gke", "--name", "a", "--image", "i", "--hosts", "2", "--devices-per-host", "8",
            "--accelerator", "nvidia-h100-80gb", "--", "--preset", "tiny"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"in the pods, which lose it: give --claim .*gs://BUCK"):
        render_job([*argv, "--run-dir", "/mnt/shared/a"])


def test_damage_is_noticed():
    text = render(SLICES, TRAIN)
    with pytest.raises(ConfigError, match="see parallelism"):
        check_jobset(text.replace("completions: 64", "completions: 63"))
    with pytest.raises(ConfigError, match="not valid"):
        check_jobset("kind: JobSet\nspec: {}\n")

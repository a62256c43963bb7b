"""SkyPilot's tasks: the part of its schema that is written, and what the nodes run."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import yaml

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.cli.render import render_job
from mmfree_jax.launch.jobs.sky import Sky
from mmfree_jax.launch.render import render

AWKWARD = '/mnt/shared/o\'hara $(reboot) `x` "run" \U0001f600é'
LINES = AWKWARD + "\u2028\x85\ufeff\n\n  x: y\n"
ONE = Sky(name="mm", accelerators="H100:8", setup="pip install /mnt/shared/mmfree.whl # it's ours")
ALL = dataclasses.replace(
    ONE, nodes=4, infra="gcp/us-central1/us-central1-a", image="registry/mmfree:1", setup="",
    bucket="gs://mine/data", spot=True,
)  # fmt: skip

# The part that is written here of get_task_schema() and _get_single_resources_schema() in
# sky/utils/schemas.py of https://github.com/skypilot-org/skypilot; all else is refused.
_TEXT = {"type": "string"}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": _TEXT,
        "num_nodes": {"type": "integer"},
        "setup": _TEXT,
        "run": _TEXT,
        "file_mounts": {"type": "object", "additionalProperties": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"source": _TEXT, "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}},
        }},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": _TEXT,
                "infra": _TEXT,
                "image_id": _TEXT,
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"recover_on_exit_codes": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        "uniqueItems": True,
                    }},
                },
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("values", [ONE, ALL], ids=["one", "all"])
@pytest.mark.parametrize("text", [AWKWARD, LINES], ids=["a line", "lines"])
def test_the_schema_takes_it_and_every_node_gets_the_command(values, text, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    train = ["--preset", "1.3B", "--run-dir", text, "--optimizer.learning-rate", "2e-3"]
    task = yaml.safe_load(render(values, train))
    jsonschema.validate(task, SCHEMA)
    program = tmp_path / "mmfree"
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    program.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                       f"print(json.dumps([sys.argv[1:], [os.environ.get(n) for n in {names}]]))\n"
                       "sys.exit(75)\n")  # fmt: skip
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NUM_NODES": str(values.nodes),
           "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}  # fmt: skip
    done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, timeout=60)
    words, found = json.loads(done.stdout)
    assert words == ["train", *train]
    assert found == (["10.0.0.1:8476", "4", "2"] if values.nodes > 1 else [None] * 3)
    assert done.returncode == 75, "SkyPilot sees how it ended"


def test_options():
    task = yaml.safe_load(render(ALL, ["--preset", "tiny"]))
    assert task["num_nodes"] == 4
    assert task["resources"] == {
        "accelerators": "H100:8",
        "infra": "gcp/us-central1/us-central1-a",
        "image_id": "docker:registry/mmfree:1",
        "use_spot": True,
        "job_recovery": {"recover_on_exit_codes": [75, 134, 137, 143]},
    }
    assert task["file_mounts"] == {"/mnt/shared": {"source": "gs://mine/data", "mode": "MOUNT"}}
    assert "setup" not in task
    task = yaml.safe_load(render(ONE, ["--preset", "tiny"]))
    assert task["setup"] == ONE.setup
    assert task["resources"]["use_spot"] is False
    assert "file_mounts" not in task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None, "accelerators": None}, "sky needs name, accelerators: give --name, --acc"),
        ({"name": "A b"}, "name is 'A b'"),
        ({"accelerators": "H100"}, "accelerators is 'H100': give NAME:COUNT, as in H100:8"),
        ({"infra": "a b"}, "infra is 'a b': give CLOUD"),
        ({"bucket": "mine"}, "bucket is 'mine': give gs://NAME or s3://NAME"),
        ({"nodes": 0}, "nodes is 0"),
        ({"setup": ""}, "setup is empty and no image is given"),
        ({"setup": "if then"}, "not valid: .* see the value of setup"),
        ({"setup": "a\nb"}, "setup is .*: give one line"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        render(dataclasses.replace(ONE, **change), ["--preset", "tiny"])


def test_a_run_directory_on_the_machines_is_refused(capsys):
    argv = ["sky", "--name", "a", "--accelerators", "H100:8", "--setup", ":"]
    run = ["--", "--preset", "tiny", "--run-dir"]
    with pytest.raises(ConfigError, match="give --bucket for one that they mount"):
        render_job([*argv, *run, "/mnt/shared/a"])
    with pytest.raises(ConfigError, match=r"outside of mount \(/mnt/shared\)"):
        render_job([*argv, "--bucket", "gs://b", *run, "runs/a"])
    assert render_job([*argv, "--bucket", "gs://b", *run, "/mnt/shared/a"]) == 0

"""Job files: what they say, that they are valid, and what is refused."""

import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.cli.render import render_job
from mmfree_jax.launch.jobs.gke import check_jobset
from mmfree_jax.launch.jobs.template import check_script
from mmfree_jax.launch.jobs.tpu_vm import TpuVm
from mmfree_jax.launch.render import render

# Everything that a shell could stumble over.
TRAIN = ["--preset", "1.3B", "--run-dir", '/shared/o\'hara $(reboot) `x`/"run"', "--steps", "9"]
TPU = TpuVm(
    name="t",
    project="p",
    zone="z",
    accelerator_type="v5litepod-256",
    package="/mnt/shared/my clone[tpu]",
    nfs="10.0.0.2:/v",
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (TpuVm(name="a", zone="z"), "tpu-vm needs project, accelerator_type, package, nfs"),
    ],
)  # fmt: skip
def test_refusals(values, message):
    with pytest.raises(ConfigError, match=message):
        render(values, TRAIN)


def test_invalid_files_are_noticed():
    with pytest.raises(ConfigError, match="not valid"):
        check_script("case x in\n")
    with pytest.raises(ConfigError, match="not valid"):
        check_jobset("kind: JobSet\nspec: {}\n")


def test_the_command_merges_values_and_flags(tmp_path, capsys):
    values, out = tmp_path / "values.yaml", tmp_path / "job.sbatch"
    values.write_text("name: mm\nnodes: 2\n")
    argv = ["slurm", "--values", str(values), "--out", str(out), "--nodes", "3"]
    assert render_job([*argv, "--", "--preset", "tiny"]) == 0
    assert "#SBATCH --nodes=3" in out.read_text()
    assert f"wrote {out}" in capsys.readouterr().out
    values.write_text("nods: 2\n")
    with pytest.raises(ConfigError, match="unknown config key 'nods'"):
        render_job(argv)
    with pytest.raises(ConfigError, match="preset is 'huge'"):
        render_job(["slurm", "--name", "a", "--nodes", "1", "--", "--preset", "huge"])
    with pytest.raises(ConfigError, match="platform is 'lsf'"):
        render_job(["lsf"])
    with pytest.raises(ConfigError, match="no arguments for mmfree train"):
        render_job(["slurm", "--name", "a", "--nodes", "1"])


@pytest.mark.parametrize("run_dir", ["/shared/runs/a", "runs/a", "/mnt/shared-not/a", None])
def test_a_run_directory_that_the_hosts_do_not_share_is_refused(run_dir):
    train = ["--preset", "tiny", *(["--run-dir", run_dir] if run_dir else [])]
    gke = ["gke", "--name", "a", "--image", "i", "--claim", "c", "--hosts", "2",
           "--accelerator", "nvidia-h100-80gb", "--devices-per-host", "8"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"run_dir is .*, outside of mount \(/mnt/shared\)"):
        render_job([*gke, "--", *train])
    assert render_job(["slurm", "--name", "a", "--nodes", "2", "--", *train]) == 0


def test_a_run_directory_below_the_mount_is_taken(capsys):
    values = ["tpu-vm", "--name", "t", "--project", "p", "--zone", "z", "--nfs", "n:/v",
              "--accelerator-type", "v5litepod-8",
              "--package", "/data/clone[tpu]", "--mount", "/data"]  # fmt: skip
    assert render_job([*values, "--", "--preset", "tiny", "--run-dir", "/data/run"]) == 0
    assert "--run-dir /data/run" in capsys.readouterr().out

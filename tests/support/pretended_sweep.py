"""A sweep whose trainer only pretends, under the real command line: for job arrays."""

import sys
from pathlib import Path

import numpy as np
import yaml

from mmfree_jax.data import writer

# The real command line, but for the trainer, which only pretends (and waits where SLOW says so).
_MMFREE = """#!{python}
import sys
from mmfree_jax.experiments.sweep.runner import run_sweep
run_sweep.__kwdefaults__["command"] = lambda config: [sys.executable, {trainer!r}, str(config)]
from mmfree_jax.cli.main import main
sys.exit(main())
"""
_TRAINER = """
import json, os, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
if os.environ.get("SLOW"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
out = config["run_dir"]
os.makedirs(out, exist_ok=True)
with open(out + "/starts", "a") as f:
    f.write(os.environ["SLURM_ARRAY_TASK_ID"] + "\\n")
open(out + "/metrics.jsonl", "a").write('{"kind": "train"}\\n')
yaml.safe_dump(config, open(out + "/config.yaml", "w"))
if os.environ.get("SLOW"):
    signal.sigwait([signal.SIGTERM])
    sys.exit(143)
steps, rate = config["steps"], config["optimizer"]["learning_rate"]
json.dump({"status": "complete", "step": steps, "tokens": steps * 256, "eval_loss": 3 + rate,
  "training_flops": 1e9, "parameters": {"total": 2, "non_embedding": 1, "ternary": 1},
  "device": {"kind": "cpu", "count": 1}, "versions": {}}, open(out + "/summary.json", "w"))
"""


def pretended_sweep(folder: Path) -> Path:
    """Writes data, sweep.yaml and a trainer; the folder of a program `mmfree` that uses it."""
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    tokens = [np.zeros(500, np.uint8)]
    writer.write_dataset(folder / "data", {"train": tokens, "heldout": tokens}, identity)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({
        "out": "out", "families": [{"learning_rates": [1e-3, 2e-3, 4e-3]}],
        "sizes": ["rung-1M"], "tokens": [1e4, 2e4], "tuning": {"tokens": 1e4},
        "train": {"batch_size": 4, "data": {"paths": ["data"], "seq_len": 64}},
    }))  # fmt: skip
    trainer, programs = folder / "trainer.py", folder / "bin"
    trainer.write_text(_TRAINER)
    programs.mkdir()
    (programs / "mmfree").write_text(_MMFREE.format(python=sys.executable, trainer=str(trainer)))
    (programs / "mmfree").chmod(0o755)
    return programs

"""A trainer that only pretends, and starts in no time, for sweeps."""

import math
from pathlib import Path

# Loss is lowest at the rate 4e-3 x (width / 128)^-1; each rate of BAD ends in another way.
TRAINER = """
import json, math, os, re, signal, sys
text = open(sys.argv[1]).read()
field = lambda name: re.search(f"^ *{name}: (.*)$", text, re.M)[1]
out, rate, planned = field("run_dir"), float(field("learning_rate")), int(field("steps"))
behaviour = os.environ.get("FAKE", "")
if behaviour in ("slow", "compiles"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.makedirs(out, exist_ok=True)
with open(out + "/starts", "a") as f:
    f.write(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "all") + "\\n")
open(out + "/gpu", "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
with open(out + "/metrics.jsonl", "a") as f:
    f.write("" if behaviour == "compiles" else '{"kind": "train"}\\n')
open(out + "/config.yaml", "w").write(text)
if behaviour in ("slow", "compiles") and len(open(out + "/starts").readlines()) == 1:
    signal.sigwait([signal.SIGTERM])
    sys.exit(143)
if rate == 0.5:
    print("mmfree: error: training is not finite: loss nan at step 3; lower the rate")
    sys.exit(2)
if rate == 0.6:
    print("mmfree: error: device memory is too small for batch_size 4")
    sys.exit(2)
if rate == 0.7:
    raise RuntimeError("a bug")
if rate == 0.8:
    os.kill(os.getpid(), signal.SIGKILL)
width = int(field("hidden_size"))
if behaviour == f"broken at {width}":
    raise RuntimeError("broken")
loss = 3 + math.log(rate / (4e-3 * 128 / width)) ** 2
steps = planned if field("stop_at") == "null" else int(field("stop_at"))
status = "complete" if steps == planned else "stopped"
summary = {"status": status, "stopped_by": "stop_at", "step": steps,
  "tokens": steps * 256, "eval_loss": loss,
  "training_flops": 1e9, "parameters": {"total": 2, "non_embedding": 1, "ternary": 1},
  "device": {"kind": "cpu", "count": 1}, "versions": {"jax": "0"}, "tokens_per_s": 1e6}
os.makedirs(out + "/checkpoints/1", exist_ok=True)
json.dump(summary, open(out + "/summary.json", "w"))
"""


def quiet(_):
    pass


def after(happened):
    """A sweep's clock, which stands until something has happened; then all its time is over."""
    return lambda: math.inf if happened() else 0.0


def starts(sweep):
    found = Path(sweep.out).glob("runs/*/starts")
    return {p.parent.name: p.read_text().split() for p in found}

"""CPU seconds of one forward pass, ours and the export's in PyTorch, in one process.

taskset -c 0 .venv/torch/bin/python tests/interop_torch/speed.py [PRESET [TOKENS]]
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # waiting threads would count

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mmfree_jax import preset
from mmfree_jax.model import LanguageModel
from mmfree_jax.saved.convert import export_hf
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.open_model import open_model


def best(call: Callable[[], Any], *, of: int = 4) -> float:
    """CPU seconds of the quickest call, after one that compiles."""
    call()
    seconds = []
    for _ in range(of):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main(name: str = "rung-61M", length: str = "2048") -> None:
    """Prints both times and their ratio."""
    config = preset(name).model
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, int(length)))
    init = jax.jit(LanguageModel(config).init)
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "ours").mkdir()
        write_model(root / "ours", config, params)
        export_hf(root / "ours", root / "hf")
        saved = open_model(root / "ours")
        ours, weights = saved.model("float32"), saved.weights("ternary")
        theirs = AutoModelForCausalLM.from_pretrained(root / "hf", trust_remote_code=True)
    apply = jax.jit(lambda weights, tokens: ours.apply(weights, tokens))
    mine = best(lambda: apply(weights, jnp.asarray(tokens, jnp.int32)).block_until_ready())
    with torch.no_grad():
        torchs = best(lambda: theirs(torch.tensor(tokens), use_cache=False))
    print(f"{name}, {length} tokens, CPU seconds: ours {mine:.2f}, PyTorch {torchs:.2f}, "
          f"{torchs / mine:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How far 8-bit backward products turn a training run's gradients, at several of its steps.

`python -m mmfree_jax.experiments.gradient_agreement RUN DATA --steps 1000 3000 5000` takes one
batch of training rows and the run's checkpoints, and compares the gradient by `model.backward`
int8_dx and int8 with that by bf16: the cosine between them for each kind of parameter, the least
and the mean over the layers, and the ratio of the norms of the whole. One JSON line a step.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.experiments.gradient_rounding import gradients, read_batch
from mmfree_jax.model.parameters import flatten
from mmfree_jax.model.weights import Master
from mmfree_jax.saved.open_model import open_model


def cosines(found: Any, expected: Any) -> dict[str, tuple[float, float]]:
    """Parameter -> the least and the mean cosine over its leading axis, which is the layers'.

    Args:
      found, expected: trees of gradients; a vector or matrix outside the layers counts as one.
    """
    table = {}
    flat_found, flat_expected = flatten(found), flatten(expected)
    for name, b in flat_expected.items():
        rows = b.shape[0] if name.startswith("blocks/") else 1
        a, b = (g.astype(jnp.float32).reshape(rows, -1) for g in (flat_found[name], b))
        norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
        cosine = jnp.sum(a * b, axis=1) / jnp.maximum(norms, 1e-30)
        table[name] = (round(float(cosine.min()), 5), round(float(cosine.mean()), 5))
    return table


def global_norm(tree: Any) -> float:
    """The Euclidean norm of all of a tree's elements."""
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(tree))))


def main(argv: list[str]) -> int:
    """Prints the cosines of a run's gradients on rows of a prepared data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("data", help="folder written by `mmfree data prepare`")
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="checkpoints")
    parser.add_argument("--rows", type=int, default=8, help="rows of --length tokens")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--matmul-kernel", default=None, help="see `model.matmul_kernel`")
    options = parser.parse_args(argv)
    batch = read_batch(options.data, options.rows, options.length)
    for step in options.steps:
        saved = open_model(options.run, step=step)
        config = dataclasses.replace(saved.config, matmul_kernel=options.matmul_kernel)
        weights = saved.weights("master")
        assert isinstance(weights, Master)
        params = weights.params
        exact = gradients(params, dataclasses.replace(config, backward="bf16"), batch)
        line = {"run": options.run, "step": step, "tokens": batch["tokens"].shape}
        for backward in ("int8_dx", "int8"):
            found = gradients(params, dataclasses.replace(config, backward=backward), batch)
            line[backward] = {
                "norm_ratio": round(global_norm(found) / global_norm(exact), 5),
                "cosine_least_and_mean": cosines(found, exact),
            }
        print(json.dumps(line | {"device": jax.devices()[0].device_kind}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

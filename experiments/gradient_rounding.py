"""How much 8 bits round the backward products of a trained model, on its own gradients.

`python -m mmfree_jax.experiments.gradient_rounding RUN DATA` takes one batch of training rows,
and for each kind of layer compares dX and dW from an incoming gradient in int8 with the products
in float32: relative errors (norm of the difference over the norm), the mean over layers. dW is
tried with a column's scale shared by blocks of 128 tokens up to the whole batch. One JSON line.
"""

import argparse
import collections
import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mmfree_jax
from mmfree_jax.data.dataset import TRAIN, open_dataset
from mmfree_jax.model import LanguageModel, training_weights
from mmfree_jax.pallas_kernels.bitlinear.api import int8_backward
from mmfree_jax.train.loss import loss_sums

BLOCKS = (128, 256, 512, 1024, 2048, 4096, 16384)
# The order in which a block's backward pass asks for its products.
_LAYERS = ("down_proj", "gate_up_proj", "o_proj", "i_proj", "f_proj", "g_proj")

Errors = dict[str, dict[str, list[float]]]


def relative_error(found: jax.Array, exact: jax.Array) -> jax.Array:
    """Norm of the difference over the norm of `exact`."""
    return jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel())


def measure(params: dict[str, Any], config: Any, batch: dict[str, jax.Array]) -> Errors:
    """Errors of every layer's products for one batch.

    Args:
      params: of a trained model.
      config: of the model; its layers are unrolled, so that each is asked for by itself.
      batch: "tokens", "targets", "segment_ids", int32 [B, T] each.

    Returns:
      Layer name -> product ("dx", "dw 128", ...) -> the error in each block, last block first.
    """
    errors: Errors = collections.defaultdict(lambda: collections.defaultdict(list))
    asked = {"dx": 0, "dw": 0}
    exact_dx, exact_dw = int8_backward.input_gradient, int8_backward.weight_gradient

    def record(product: str) -> str:
        name = _LAYERS[asked[product] % len(_LAYERS)]
        asked[product] += 1
        return name

    def input_gradient(d: jax.Array, trits: jax.Array, out_dtype: Any) -> jax.Array:
        name, wide = record("dx"), trits.astype(jnp.float32)
        exact = jnp.matmul(d.astype(jnp.float32), wide, precision="highest")
        found = exact_dx(d, trits, jnp.float32)
        jax.debug.callback(
            lambda e: errors[name]["dx"].append(float(e)), relative_error(found, exact)
        )
        return exact.astype(out_dtype)

    def weight_gradient(
        d: jax.Array, x: jax.Array, x_scale: jax.Array, out_dtype: Any
    ) -> jax.Array:
        name = record("dw")
        rows = d.astype(jnp.float32).reshape(-1, d.shape[-1])
        inputs = (x * x_scale).reshape(-1, x.shape[-1])
        exact = jnp.matmul(rows.T, inputs, precision="highest")
        for block in BLOCKS:
            found = exact_dw(d, x, x_scale, jnp.float32, block_tokens=block)
            jax.debug.callback(
                lambda e, key=f"dw {block}": errors[name][key].append(float(e)),
                relative_error(found, exact),
            )
        return exact.astype(out_dtype)

    int8_backward.input_gradient, int8_backward.weight_gradient = input_gradient, weight_gradient
    try:
        config = dataclasses.replace(config, backward="int8", scan_layers=False, remat="none")
        jax.block_until_ready(gradients(params, config, batch))
        jax.effects_barrier()
    finally:
        int8_backward.input_gradient, int8_backward.weight_gradient = exact_dx, exact_dw
    return errors


def gradients(params: dict[str, Any], config: Any, batch: dict[str, jax.Array]) -> Any:
    """The gradient of a batch's summed loss, a tree as `params`."""
    model = LanguageModel(config)

    @jax.jit
    def of(params: dict[str, Any]) -> Any:
        weights = training_weights(params, config)

        def loss(params: dict[str, Any]) -> jax.Array:
            return loss_sums(dataclasses.replace(weights, params=params), batch, model=model)[0]

        return jax.grad(loss)(params)

    return of(params)


def read_batch(data: str, rows: int, length: int) -> dict[str, jax.Array]:
    """The first rows of a prepared data set's training part, as `measure` takes them."""
    tokens = np.asarray(open_dataset(data, TRAIN).tokens(0, rows * length + 1), np.int32)
    return {
        "tokens": jnp.asarray(tokens[:-1].reshape(rows, length)),
        "targets": jnp.asarray(tokens[1:].reshape(rows, length)),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
    }


def main(argv: list[str]) -> int:
    """Prints the errors of a run's model on rows of a prepared data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("data", help="folder written by `mmfree data prepare`")
    parser.add_argument("--rows", type=int, default=8, help="rows of --length tokens")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    options = parser.parse_args(argv)
    model, params = mmfree_jax.load_pretrained(options.run)
    batch = read_batch(options.data, options.rows, options.length)
    errors = measure(params, model.config, batch)
    table = {
        name: {key: round(float(np.mean(values)), 5) for key, values in products.items()}
        for name, products in errors.items()
    }
    device = jax.devices()[0].device_kind
    print(
        json.dumps(
            {"run": options.run, "tokens": batch["tokens"].shape, "device": device, "errors": table}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

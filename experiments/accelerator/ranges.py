"""The largest magnitude at each place of the float model: what fixed-point formats are fitted to.

The model is that of `real_parts`: the same function as the trained one up to the int8 rounding
of activations, which is left out, and the norms, which follow the numerics' switches.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.model_config import ModelConfig

Tree = dict[str, Any]


def ranges(real: Tree, config: ModelConfig, eps: float | None, tokens_BT: jax.Array) -> Tree:
    """max|x| at each site: {"layers": {site: [L]}, "final": {site: scalar}}.

    Where `real` has two norms, "v gain" and "v2 gain" are what the second multiplies by on average.
    """
    outer_eps = config.norm_eps if eps is None else eps
    own_eps = config.linear_norm_eps if eps is None else eps

    def norm(x: jax.Array, eps: float) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)

    def product(x: jax.Array, p: Tree, name: str) -> jax.Array:
        y = jnp.einsum("btk,nk->btn", x, p[f"trits/{name}"].astype(jnp.float32))
        return y * jnp.exp2(p[f"exponent/{name}"].astype(jnp.float32))

    def doubled(x: jax.Array, p: Tree, name: str, at: Tree, site: str) -> jax.Array:
        u = norm(x, outer_eps)
        if f"weight/{name}" in p:
            at[name] = u * p[f"weight/{name}"]
            at[f"{site}'"] = u
            u = norm(at[name], own_eps)
            square = jnp.mean(at[name] * at[name], -1)
            at[f"{name} gain"] = jnp.mean(jax.lax.rsqrt(square + own_eps))
        at[site] = u
        return u

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, Tree]:
        at: Tree = {"x0": x}
        u = doubled(x, p, "v", at, "u")
        for name in ("i", "f", "g"):
            at[f"x{name}"] = u * p[f"weight/{name}"]
            at[name] = product(at[f"x{name}"], p, name)
        f = p["bound"] + (1 - p["bound"]) * jax.nn.sigmoid(at["f"])
        enters = jax.nn.silu(at["i"])
        _, h = jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (f, enters * (1 - f)), axis=1
        )
        at["h"] = jnp.maximum(jnp.abs(h), jnp.abs(enters))
        at["sh"] = jax.nn.silu(h)
        at["gn"] = norm(at["g"], outer_eps)
        at["gs"] = at["gn"] * p["weight/gate_norm"]
        at["o"] = at["gs"] * at["sh"]
        at["on"] = norm(at["o"], own_eps)
        at["os"] = at["on"] * p["weight/o"]
        y = product(at["os"], p, "o")
        x = x + y
        at["x1"] = jnp.maximum(jnp.abs(x), jnp.abs(y))
        u = doubled(x, p, "v2", at, "u2")
        at["xu"] = u * p["weight/gate"]
        at["gate"], at["up"] = product(at["xu"], p, "gate"), product(at["xu"], p, "up")
        at["s"] = jax.nn.silu(at["gate"])
        at["p"] = at["s"] * at["up"]
        at["pn"] = norm(at["p"], own_eps)
        at["ps"] = at["pn"] * p["weight/down"]
        y = product(at["ps"], p, "down")
        x = x + y
        at["x2"] = jnp.maximum(jnp.abs(x), jnp.abs(y))
        # Beyond 8 the sigmoid is 1: f may saturate there.
        at["f"] = jnp.minimum(jnp.abs(at["f"]), 7.99)
        return x, _peaks(at)

    def run(real: Tree, tokens_BT: jax.Array) -> Tree:
        x = jnp.take(real["embedding"], tokens_BT, axis=0)
        x, layers = jax.lax.scan(layer, x, real["layers"])
        # Every token's row has to fit the format.
        everything = jnp.max(jnp.abs(real["embedding"]))
        layers["x0"] = layers["x0"].at[0].max(everything)
        p, at = real["final"], {}
        u = doubled(x, p, "v", at, "u")
        at["xh"] = u * p["weight/head"]
        at["logits"] = product(at["xh"], p, "head")
        return {"layers": layers, "final": _peaks(at)}

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(jax.tree.map(jnp.asarray, real), tokens_BT)


def _peaks(at: Tree) -> Tree:
    peaks = {site: jnp.max(jnp.abs(x)) for site, x in at.items()}
    for site in [s for s in peaks if s.endswith("'")]:  # both norms share one format
        peaks[site[:-1]] = jnp.maximum(peaks[site[:-1]], peaks.pop(site))
    return peaks

"""A trained model as integers: trits, norm scales, fraction bits of every value, and shifts.

The scale of a ternary matrix, s = m 2^e with 1 <= m < 2, costs no multiplier: m is folded into
the norm scales in front of it before they are rounded, and e into the shift behind it.

Fraction bits come from the largest magnitude that the float model shows at each place
("site"), layer by layer, while it reads text that it wrote itself: no data is needed.

Sites of a block, in order: x0 (residual in), u (normed), v (double norms only), xi xf xg (scaled,
into the products), i f g (out of them), h (recurrent state and what enters it), sh (silu(h)),
gn gs (normed and scaled gate), o (gated), on (normed), os (scaled), x1 (residual), u2 v2 xu
(GLU: normed, scaled), gate up (products), s (silu), p (gated), pn ps (normed, scaled), x2.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator import fixed
from mmfree_jax.experiments.accelerator.numerics import Numerics
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.packing import can_pack, lower_bounds
from mmfree_jax.model.weights import Ternary, Weights
from mmfree_jax.model_config import ModelConfig

Tree = dict[str, Any]

# (norm scale, matrices behind it, their inputs' site)
MATRICES = ("i", "f", "g", "o", "gate", "up", "down")
# Sites that always have 16 bits.
_WIDE = ("x0", "x1", "x2", "h", "u", "v", "u2", "v2", "gn", "gs", "on", "pn")


@dataclass(frozen=True)
class Quantized:
    """A model in integers.

    Attributes:
      config: of the float model.
      numerics: the switches.
      arrays: {"embedding" [V, D] int16, "layers": {"trits/NAME" [L, N, K] int8, "weight/NAME"
        [L, K] int16, "bound/lower" and "bound/rest" [L, D] int16, "shift/NAME" and "eps/NAME" and
        "frac/SITE" [L] int32}, "final": the same without L}.
    """

    config: ModelConfig
    numerics: Numerics
    arrays: Tree


def check_supported(config: ModelConfig) -> None:
    """Raises ConfigError unless the model is one that the hardware runs."""
    if config.unreleased:
        raise ConfigError(
            f"{' and '.join(config.unreleased)}: fixed-point numerics need layers as released; "
            "train a model without this setting"
        )
    if not can_pack(config) or not config.as_released or config.expand_ratio != 1:
        raise ConfigError(
            f"the model is a {config.family}: fixed-point numerics need an MLGRU as released, with "
            "BitLinear layers throughout, expand_ratio 1 and no short_conv"
        )
    largest = max(config.hidden_size, config.glu_size)
    if largest > fixed.MAX_COLUMNS:
        raise ConfigError(f"the model is {largest} wide: at most {fixed.MAX_COLUMNS} is supported")


def real_parts(weights: Weights, config: ModelConfig, gains: Tree | None = None) -> Tree:
    """Float norm scales with everything folded in, trits, and the matrices' exponents.

    Args:
      weights: of the model.
      config: of the model.
      gains: what stands for a block's second norm where one is to do for two, {"v" [L], "v2"
        [L]}; None: both norms are kept. The head, once a token, always keeps its two.

    Returns:
      {"layers": {"trits/..", "weight/..", "exponent/..", "bound"}, "final": {...}, "embedding"}.
    """
    if not isinstance(weights, Ternary):
        raise TypeError(f"weights are {type(weights).__name__}: ternarise them (`as_weights`)")
    params, ternary = weights.params, weights.ternary
    f32 = lambda x: np.asarray(x, np.float32)  # noqa: E731

    def mantissa(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e = np.floor(np.log2(scale))
        return (scale / 2.0**e)[..., None], e.astype(np.int32)

    def group(out: Tree, name: str, outer: Any, linear: Tree, trits: Tree, gain: str = "") -> None:
        m, e = mantissa(f32(trits["scale"])[..., 0, 0])
        weight = f32(linear["norm_scale"]) * m
        if outer is not None and gains is not None:
            weight = weight * outer * f32(gains[gain])[..., None]
        out[f"weight/{name}"], out[f"exponent/{name}"] = weight, e

    blocks, trits = params["blocks"], ternary["blocks"]
    outer = f32(blocks["mixer_norm"]["scale"])
    layers: Tree = {}
    for name in ("i", "f", "g"):
        path = f"{name}_proj"
        group(layers, name, outer, blocks["mixer"][path], trits["mixer"][path], "v")
        layers[f"trits/{name}"] = np.asarray(trits["mixer"][path]["trits"])
    layers["weight/gate_norm"] = f32(blocks["mixer"]["gate_norm"]["scale"])
    group(layers, "o", None, blocks["mixer"]["o_proj"], trits["mixer"]["o_proj"])
    layers["trits/o"] = np.asarray(trits["mixer"]["o_proj"]["trits"])
    glu_outer = f32(blocks["glu_norm"]["scale"])
    gate_up = trits["glu"]["gate_up_proj"]
    group(layers, "gate", glu_outer, blocks["glu"]["gate_up_proj"], gate_up, "v2")
    layers["exponent/up"] = layers["exponent/gate"]
    layers["trits/gate"], layers["trits/up"] = np.split(np.asarray(gate_up["trits"]), 2, axis=1)
    group(layers, "down", None, blocks["glu"]["down_proj"], trits["glu"]["down_proj"])
    layers["trits/down"] = np.asarray(trits["glu"]["down_proj"]["trits"])
    if gains is None:
        layers["weight/v"], layers["weight/v2"] = outer, glu_outer
    layers["bound"] = f32(lower_bounds(params.get("lower_bounds"), config))

    final_outer = f32(params["final_norm"]["scale"])
    final: Tree = {"trits/head": np.asarray(ternary["head"]["trits"])}
    group(final, "head", None, params["head"], ternary["head"])
    final["weight/v"] = final_outer
    return {"embedding": f32(params["embedding"]["weight"]), "layers": layers, "final": final}


def quantize(
    weights: Weights, config: ModelConfig, numerics: Numerics, tokens_BT: np.ndarray
) -> Quantized:
    """A model in integers, its formats fitted to what it does on `tokens_BT`.

    Args:
      weights: of the model.
      config: of the model.
      numerics: the switches.
      tokens_BT: text to fit the formats to; see `self_written`.

    Raises:
      ConfigError: the model is of a kind that the hardware does not run.
    """
    from mmfree_jax.experiments.accelerator.ranges import ranges

    check_supported(config)
    real = real_parts(weights, config)
    peaks = ranges(real, config, numerics.eps, jnp.asarray(tokens_BT))
    if numerics.fused_norm:
        gains = {name: peaks["layers"][f"{name} gain"] for name in ("v", "v2")}
        real = real_parts(weights, config, gains)
        peaks = ranges(real, config, numerics.eps, jnp.asarray(tokens_BT))
    layer_peaks, final_peaks = (jax.tree.map(np.asarray, peaks[k]) for k in ("layers", "final"))
    # The residual stream's format only gets coarser with depth, so that one shift aligns it.
    order = np.stack([layer_peaks[s] for s in ("x0", "x1", "x2")], 1).reshape(-1)
    order = np.maximum.accumulate(order).reshape(-1, 3)
    # x2 of a layer is x0 of the next.
    for k, site in enumerate(("x0", "x1", "x2")):
        layer_peaks[site] = order[:, k]
    layers = _integers(real["layers"], layer_peaks, config, numerics)
    final = _final_integers(real["final"], final_peaks, layers["frac/x2"][-1], config, numerics)
    table = np.rint(real["embedding"] * 2.0 ** int(layers["frac/x0"][0]))
    embedding = np.clip(table, -32_768, 32_767).astype(np.int16)
    return Quantized(config, numerics, {"embedding": embedding, "layers": layers, "final": final})


def self_written(
    config: ModelConfig, weights: Weights, *, rows: int = 8, length: int = 128, seed: int = 0
) -> np.ndarray:
    """Text for fitting formats: each row a random token and what the model writes behind it."""
    from mmfree_jax.infer.api import generate

    rng = np.random.default_rng(seed)
    first = rng.integers(0, config.vocab_size, rows)
    # The plain program has no inference form.
    model = LanguageModel(dataclasses.replace(config, bitlinear="fused"))
    out = generate(model, weights, [[int(t)] for t in first], max_new_tokens=length - 1, seed=seed)
    return np.array([[int(t), *row] for t, row in zip(first, out.tokens, strict=True)], np.int32)


def _frac(peak: np.ndarray, bits: int, *, headroom: float, most: int = 15) -> np.ndarray:
    """Fraction bits with which `headroom` times the peak fits `bits`."""
    whole = np.ceil(np.log2(np.maximum(peak * headroom, 2.0**-15)))
    return np.clip(bits - 1 - whole, 0, most).astype(np.int32)


def _weight(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Norm scales as integers and their fraction bits: the power of two that holds the largest."""
    peak = np.abs(values).max(-1)
    frac = np.floor(np.log2((2.0 ** (bits - 1) - 1) / np.maximum(peak, 2.0**-12)))
    frac = np.clip(frac, 0, 20).astype(np.int32)
    limit = 2 ** (bits - 1)
    scaled = np.rint(values * 2.0 ** frac[..., None])
    return np.clip(scaled, -limit, limit - 1).astype(np.int16), frac


def _fracs(peaks: Tree, numerics: Numerics) -> Tree:
    out = {}
    for site, peak in peaks.items():
        if site.endswith(" gain"):
            continue
        wide = site in _WIDE or numerics.activation_bits == 16
        bits = 16 if wide else numerics.activation_bits
        out[site] = _frac(np.asarray(peak), bits, headroom=2.0 if wide else 1.0)
    return out


def _integers(real: Tree, peaks: Tree, config: ModelConfig, numerics: Numerics) -> Tree:
    frac = _fracs(peaks, numerics)
    eps_of = lambda own: own if numerics.eps is None else numerics.eps  # noqa: E731
    outer_eps, own_eps = eps_of(config.norm_eps), eps_of(config.linear_norm_eps)
    width, inner = config.hidden_size, config.glu_size
    out: Tree = {}
    weight_frac = {}
    for name in [k.removeprefix("weight/") for k in real if k.startswith("weight/")]:
        out[f"weight/{name}"], weight_frac[name] = _weight(
            real[f"weight/{name}"], numerics.weight_bits
        )
    for name in MATRICES:
        out[f"trits/{name}"] = real[f"trits/{name}"]

    def shift(name: str, value: Any) -> None:
        out[f"shift/{name}"] = np.asarray(value, np.int32)

    def lower(site: str, bound: np.ndarray) -> None:
        frac[site] = np.minimum(frac[site], bound).astype(np.int32)

    # A shift is never to the left: a result has no more fraction bits than its factors.
    scaled = {"xi": ("u", "i"), "xf": ("u", "f"), "xg": ("u", "g"), "gs": ("gn", "gate_norm")}
    scaled |= {"os": ("on", "o"), "xu": ("u2", "gate"), "ps": ("pn", "down")}
    if not numerics.fused_norm:
        scaled |= {"v": ("u", "v"), "v2": ("u2", "v2")}
    for site, (source, name) in scaled.items():
        lower(site, frac[source] + weight_frac[name])
        shift(site, frac[source] + weight_frac[name] - frac[site])
    products = {"i": ("xi", "i"), "f": ("xf", "f"), "g": ("xg", "g")}
    products |= {"gate": ("xu", "gate"), "up": ("xu", "up")}
    products |= {"x1": ("os", "o"), "x2": ("ps", "down")}
    for site, (source, name) in products.items():
        finest = frac[source] - real[f"exponent/{name}"]
        lower(site, finest)
        shift(site, finest - frac[site])
    # Each residual site at most as fine as the one before it.
    chain = np.stack([frac["x0"], frac["x1"], frac["x2"]], 1).reshape(-1)
    chain = np.minimum.accumulate(chain).reshape(-1, 3)
    frac["x0"], frac["x1"], frac["x2"] = chain.T.copy()
    frac["x0"][1:] = frac["x2"][:-1]
    for site, (source, name) in (("x1", ("os", "o")), ("x2", ("ps", "down"))):
        shift(site, frac[source] - real[f"exponent/{name}"] - frac[site])
    shift("add1", frac["x0"] - frac["x1"])
    shift("add2", frac["x1"] - frac["x2"])
    lower("h", fixed.GATE_FRAC + frac["i"])
    shift("c", fixed.GATE_FRAC + frac["i"] - frac["h"])
    shift("sh", fixed.GATE_FRAC + frac["h"] - frac["sh"])
    lower("o", frac["gs"] + frac["sh"])
    shift("o", frac["gs"] + frac["sh"] - frac["o"])
    lower("s", fixed.GATE_FRAC + frac["gate"])
    shift("s", fixed.GATE_FRAC + frac["gate"] - frac["s"])
    lower("p", frac["s"] + frac["up"])
    shift("p", frac["s"] + frac["up"] - frac["p"])
    norms = {"u": ("x0", width, outer_eps), "u2": ("x1", width, outer_eps)}
    norms |= {"gn": ("g", width, outer_eps), "on": ("o", width, own_eps)}
    norms |= {"pn": ("p", inner, own_eps)}
    if not numerics.fused_norm:
        norms |= {"uv": ("v", width, own_eps), "uv2": ("v2", width, own_eps)}
    for site, (source, n, eps) in norms.items():
        target = {"uv": "u", "uv2": "u2"}.get(site, site)
        out[f"eps/{site}"] = np.array(
            [fixed.norm_eps(n, eps, int(k)) for k in frac[source]], np.int32
        )
        shift(site, [fixed.norm_constants(n, int(k))[1] for k in frac[target]])
    lower_bound = np.rint(real["bound"] * fixed.ONE).astype(np.int16)
    out["bound/lower"] = lower_bound
    out["bound/rest"] = (fixed.ONE - lower_bound).astype(np.int16)
    _check_shifts(out)
    return out | {f"frac/{site}": value for site, value in frac.items()}


def _final_integers(
    real: Tree, peaks: Tree, frac_x: int, config: ModelConfig, numerics: Numerics
) -> Tree:
    outer = config.norm_eps if numerics.eps is None else numerics.eps
    own = config.linear_norm_eps if numerics.eps is None else numerics.eps
    n = config.hidden_size
    frac = {site: int(value) for site, value in _fracs(peaks, numerics).items()}
    weight, weight_frac = _weight(real["weight/head"], numerics.weight_bits)
    out: Tree = {"trits/head": real["trits/head"], "weight/head": weight}
    out["weight/v"], v_frac = _weight(real["weight/v"], numerics.weight_bits)
    frac["v"] = min(frac["v"], frac["u"] + int(v_frac))
    out["shift/v"] = np.int32(frac["u"] + v_frac - frac["v"])
    out["eps/uv"] = np.int32(fixed.norm_eps(n, own, frac["v"]))
    out["shift/uv"] = np.int32(fixed.norm_constants(n, frac["u"])[1])
    frac["xh"] = min(frac["xh"], frac["u"] + int(weight_frac))
    out["shift/xh"] = np.int32(frac["u"] + weight_frac - frac["xh"])
    # Logits have 16 bits whatever the activations have.
    logits = int(_frac(np.asarray(peaks["logits"]), 16, headroom=2.0))
    finest = frac["xh"] - int(real["exponent/head"])
    frac["logits"] = min(logits, finest)
    out["shift/logits"] = np.int32(finest - frac["logits"])
    out["eps/u"] = np.int32(fixed.norm_eps(n, outer, int(frac_x)))
    out["shift/u"] = np.int32(fixed.norm_constants(n, frac["u"])[1])
    _check_shifts(out)
    return out | {f"frac/{site}": np.int32(value) for site, value in frac.items()}


def _check_shifts(out: Tree) -> None:
    for name, value in out.items():
        if not name.startswith("shift/") or name.split("/")[1] in ("u", "u2", "gn", "on", "pn"):
            continue  # the static part of a norm's shift has either sign
        if name.split("/")[1] in ("uv", "uv2"):
            continue
        if np.min(value) < 0 or np.max(value) > 30:
            raise ConfigError(
                f"{name} is {math.floor(float(np.min(value)))} to {float(np.max(value)):.0f}: the "
                "weights' scales are too far from 1 for 16-bit words"
            )

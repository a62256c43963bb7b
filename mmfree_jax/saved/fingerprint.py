"""Numbers that tell models apart, the same for trained, ternary and packed weights.

A digest would do if ternarising gave the same bits everywhere. It does so on one kind of device
only: a matrix's scale is a sum over all of it, which devices order differently, and a weight that
lies on a boundary to within a last bit then gets another trit, one in ten million or so. So trits
are compared by sums, with that much slack. What is not ternary is compared exactly as bfloat16,
in which packed files may keep the embedding, and those of earlier versions the norms; a model
packed with an int8 embedding is therefore another model.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.mixer_pattern import BOUNDED
from mmfree_jax.model import depth
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model.packing import lower_bounds
from mmfree_jax.model.parameters import flatten
from mmfree_jax.model.weights import Packed, PackedLinear, Params, Ternary, Weights, as_weights
from mmfree_jax.model_config import ModelConfig

_SUMS = 8
# Relative, of scales and lower bounds; a training step changes far more.
_TOLERANCE = 1e-5
# Share of a matrix's trits that two devices may see differently.
_FLIPPED = 1e-6


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What tells a model from others.

    Attributes:
      scales: float32, of every ternary matrix, and the forget gates' lower bounds.
      sums: int32 [matrices, 8], of each matrix's trits, with random signs by row and column.
      slack: int32 [matrices], by how much the sums of one model may differ.
      others: SHA-256 of all other parameters in bfloat16, uint8 [32].
    """

    scales: np.ndarray
    sums: np.ndarray
    slack: np.ndarray
    others: np.ndarray

    def matches(self, tensors: Mapping[str, np.ndarray]) -> bool:
        """Whether `tensors` are of the same model."""
        found = [tensors[name] for name in ("scales", "sums", "others")]
        wanted = (self.scales, self.sums, self.others)
        if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
            return False
        difference = np.abs(found[1].astype(np.int64) - self.sums)
        return bool(
            np.allclose(found[0], self.scales, rtol=_TOLERANCE, atol=1e-7)
            and (difference <= self.slack[:, None]).all()
            and (found[2] == self.others).all()
        )

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file keeps of it."""
        return {"scales": self.scales, "sums": self.sums, "others": self.others}


def fingerprint(weights: Weights, config: ModelConfig) -> Fingerprint:
    """The fingerprint of a model's weights, in any form."""
    weights = as_weights(weights, dataclasses.replace(config, bitlinear="fused"))
    if isinstance(weights, Packed):
        matrices, others = _parts_of_packed(weights, config)
        bounds = _bounds_of_packed(weights, config)
    else:
        assert isinstance(weights, Ternary)
        matrices, others = _parts_of_ternary(weights)
        raw = others.pop("lower_bounds", None)
        bounds = lower_bounds(raw, config) if config.bounded_layers else jnp.zeros(0)
    scales = [scale for _, scale in (matrices[name] for name in sorted(matrices))] + [bounds]
    sums, slack = [np.zeros((0, _SUMS), np.int32)], []
    for name in sorted(matrices):
        stack, scale = matrices[name]
        shape = _shape(stack)
        sums.append(np.asarray(_signed_sums(stack, *_signs(*shape[-2:]))))
        slack += [int(_FLIPPED * shape[-2] * shape[-1])] * scale.size
    digest = hashlib.sha256()
    for name in sorted(others):
        digest.update(np.ascontiguousarray(others[name].astype(jnp.bfloat16)).tobytes())
    return Fingerprint(
        np.concatenate([np.asarray(x, np.float32).ravel() for x in scales]),
        np.concatenate(sums),
        np.array(slack, np.int32),
        np.frombuffer(digest.digest(), np.uint8),
    )


_Matrices = dict[str, tuple[jax.Array | PackedLinear, jax.Array]]


def _parts_of_ternary(weights: Ternary) -> tuple[_Matrices, Params]:
    """Stacks of trits with their scales, and all other parameters, by path."""
    ternary = flatten(weights.ternary)
    layers = [name.removesuffix("/trits") for name in ternary if name.endswith("/trits")]
    matrices: _Matrices = {}
    for layer in layers:
        trits = ternary[f"{layer}/trits"]
        matrices[layer] = trits.reshape(-1, *trits.shape[-2:]), ternary[f"{layer}/scale"]
    # In training the master weights are there too.
    masters = {f"{layer}/{name}" for layer in layers for name in ("weight", "log_scale")}
    others = {name: x for name, x in flatten(weights.params).items() if name not in masters}
    return matrices, others


def _parts_of_packed(weights: Packed, config: ModelConfig) -> tuple[_Matrices, Params]:
    embedding = weights.embedding.table_VD
    if weights.embedding.row_scale_V1 is not None:
        embedding = embedding.astype(jnp.float32) * weights.embedding.row_scale_V1
    others: dict[str, Any] = {
        "embedding/weight": embedding,
        "final_norm/scale": weights.final_norm_D,
        "head/norm_scale": weights.head.norm_scale,
    }
    linears: dict[str, PackedLinear] = {}
    for place, (name, blocks) in enumerate(zip(config.period, weights.blocks, strict=True)):
        path = "/".join(depth.place_path(place, config))
        form = mixer_of(name).packed
        assert form is not None  # it is packed
        for part, group in (("mixer", blocks.mixer), ("glu", blocks.glu)):
            for field, linear in zip(group._fields, group, strict=True):
                if isinstance(linear, PackedLinear):
                    linears[f"{path}/{part}/{field}"] = linear
        others[f"{path}/glu_norm/scale"] = blocks.glu.norm
        for field, own in form.vectors.items():
            if (vector := getattr(blocks.mixer, field)) is not None:
                others[f"{path}/{own}"] = vector
    others |= {f"{name}/norm_scale": linear.norm_scale for name, linear in linears.items()}
    linears["head"] = weights.head_stack()
    return {name: (linear, linear.scale) for name, linear in linears.items()}, others


def _bounds_of_packed(weights: Packed, config: ModelConfig) -> jax.Array:
    """The forget gates' lower bounds of all layers that have them, in order."""
    places = zip(config.period, weights.blocks, strict=True)
    bounds = [blocks.mixer.lower_bound for name, blocks in places if name in BOUNDED]
    return jnp.stack(bounds, axis=1) if bounds else jnp.zeros(0)


def _shape(stack: jax.Array | PackedLinear) -> tuple[int, ...]:
    if isinstance(stack, PackedLinear):
        return jax.eval_shape(lambda: stack.trits()).shape
    return stack.shape


def _signs(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed random signs: float32 [N, 8] and [K, 8]."""

    def signs(seed: bytes, count: int) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(hashlib.shake_256(seed).digest(count), np.uint8))
        return 2.0 * bits.reshape(count, _SUMS).astype(np.float32) - 1

    return signs(b"rows", rows), signs(b"columns", columns)


@jax.jit
def _signed_sums(
    stack: jax.Array | PackedLinear, rows_NS: jax.Array, columns_KS: jax.Array
) -> jax.Array:
    """sum_nk r_n t_nk c_k for each matrix and each pair of signs: exact, int32 [matrices, 8]."""

    def one(layer: jax.Array | PackedLinear) -> jax.Array:
        trits_NK = layer.trits() if isinstance(layer, PackedLinear) else layer
        # Float32 is exact here: at most K, which is below 2^24.
        sums_NS = jnp.dot(trits_NK.astype(jnp.float32), columns_KS, precision="highest")
        return jnp.sum((sums_NS * rows_NS).astype(jnp.int32), axis=0)

    return jax.lax.map(one, stack)

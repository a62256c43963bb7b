"""What the backward pass keeps of each block, and what it computes again.

Keeping an array of the scan over layers costs a copy in and a copy out, so that only what takes
longer to make than to copy is worth keeping where memory is left.
"""

from collections.abc import Callable
from typing import Any

import jax

# Names that the model and `mmfree_jax.pallas_kernels.bitlinear` give to values, by policy. A
# name that ends in "_stats" stands for two to five float32 scalars a token.
_SCALARS = ("down_stats",)  # Without them the GLU's normalised product is made for nothing else.
_STREAM = (*_SCALARS, "mixed", "o_stats")
# The products that read the stream. Behind them attention alone costs more than a pass over memory.
_PROJECTIONS = ("i_f_g", "i_f_g_stats", "q_k_v", "q_k_v_stats", "gate_up", "gate_up_stats")
SAVED_NAMES: dict[str, tuple[str, ...]] = {
    "full": _SCALARS,
    "stream": _STREAM,
    "states": (*_STREAM, "state"),
    "gated": (*_STREAM, "state", "g"),
    "gates": (*_STREAM, "i_f_g", "i_f_g_stats", "state"),
    "projections": (*_STREAM, *_PROJECTIONS),
    "dots": (*_STREAM, *_PROJECTIONS, "linear"),
}


def policy(name: str) -> Callable[..., Any]:
    """The `jax.checkpoint` policy of a `ModelConfig.remat` other than "none"."""
    named = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[name])
    if name != "dots":
        return named
    # The products of layers that are not ternary have no kernel, and are found as what they are.
    return jax.checkpoint_policies.save_from_both_policies(
        named, jax.checkpoint_policies.dots_saveable
    )

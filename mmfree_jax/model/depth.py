"""How the layers of a model lie in stacks: one for each place of the period.

Layer n of a model whose mixers repeat every P layers is number n // P in the stack of place n % P.
Where all layers are alike there is one place, and its stack is the whole tree; a pattern's stacks
are under "layer0", "layer1" and so on. So it is for parameters under `blocks`, for their trits and
for the carried state.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.mixer_pattern import BOUNDED
from mmfree_jax.model.mixer import OfLayer
from mmfree_jax.model_config import ModelConfig


def place_names(config: ModelConfig) -> tuple[str, ...]:
    """The names of the places of a pattern's period."""
    return tuple(f"layer{place}" for place in range(len(config.period)))


def place_path(place: int, config: ModelConfig) -> tuple[str, ...]:
    """Where the parameters of a place lie."""
    return ("blocks",) if len(config.period) == 1 else ("blocks", place_names(config)[place])


def mixer_at(path: Sequence[str], config: ModelConfig) -> str:
    """The mixer of the layers whose parameter lies at `path`, which begins with "blocks"."""
    if len(config.period) == 1:
        return config.period[0]
    return config.period[place_names(config).index(path[1])]


def split(stacks: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ...]:
    """The stack of each place; {} where a tree has nothing of it."""
    if len(config.period) == 1:
        return (stacks,)
    return tuple(stacks.get(name, {}) for name in place_names(config))


def join(places: Sequence[dict[str, Any]], config: ModelConfig) -> dict[str, Any]:
    """The tree of the stacks of all places."""
    if len(config.period) == 1:
        return places[0]
    return dict(zip(place_names(config), places, strict=True))


def unstack(stacks: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ...]:
    """A tree for each layer of the model, in their order."""
    places = split(stacks, config)
    return tuple(
        jax.tree.map(lambda x, n=n: x[n // len(places)], places[n % len(places)])
        for n in range(config.num_layers)
    )


def stack(layers: Sequence[dict[str, Any]], config: ModelConfig) -> dict[str, Any]:
    """The stacks of the layers of a model."""
    length = len(config.period)
    places = [
        jax.tree.map(lambda *x: jnp.stack(x), *layers[place::length]) for place in range(length)
    ]
    return join(places, config)


def of_layers(config: ModelConfig, lower_bounds_ME: jax.Array | None) -> tuple[OfLayer, ...]:
    """What the layers of each place are given beside their parameters, stacked.

    Args:
      config: of the model.
      lower_bounds_ME: of all layers whose mixer is `BOUNDED`, in their order; None where there are
        none.
    """
    length = len(config.period)
    index_NP = jnp.arange(config.num_layers, dtype=jnp.int32).reshape(-1, length)
    bounded = [place for place, mixer in enumerate(config.period) if mixer in BOUNDED]
    bounds: dict[int, jax.Array] = {}
    if lower_bounds_ME is not None:
        bounds = {at: lower_bounds_ME[n :: len(bounded)] for n, at in enumerate(bounded)}
    return tuple(OfLayer(bounds.get(place), index_NP[:, place]) for place in range(length))

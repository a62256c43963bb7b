"""The token mixers by their names."""

import functools

from mmfree_jax.errors import ConfigError
from mmfree_jax.installed import load_own
from mmfree_jax.mixer_pattern import is_own
from mmfree_jax.model import attention, hgrn2, mingru, mlgru, rglru, rwkv4
from mmfree_jax.model.mixer import Mixer

_BUILT_IN: dict[str, Mixer] = {
    "mlgru": mlgru.MIXER,
    "attention": attention.MIXER,
    "rwkv4": rwkv4.MIXER,
    "mingru": mingru.MIXER,
    "rglru": rglru.MIXER,
    "hgrn2": hgrn2.MIXER,
}


@functools.lru_cache(maxsize=64)
def mixer_of(name: str) -> Mixer:
    """The mixer of a layer: one of the package, or what a user's MODULE:NAME names.

    Raises:
      ConfigError: there is no such module or name, or it is no `Mixer`.
    """
    if not is_own(name):
        return _BUILT_IN[name]
    field = f"model.mixer is {name!r}"
    found = load_own(field, name, "a mixer")
    if not isinstance(found, Mixer):
        raise ConfigError(
            f"{field}: that is of type {type(found).__name__}; name a "
            "mmfree_jax.model.mixer.Mixer (docs/adding-a-mixer.md)"
        )
    return found

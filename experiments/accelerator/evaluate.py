"""Fixed-point numerics behind the interface of `mmfree eval`."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.evaluate.forward import FloatForward
from mmfree_jax.evaluate.numerics import Variant, Variants
from mmfree_jax.experiments.accelerator import integer_model
from mmfree_jax.experiments.accelerator.numerics import (
    Numerics,
    format_numerics,
    ladder,
    parse_numerics,
)
from mmfree_jax.experiments.accelerator.quantized import check_supported, quantize, self_written
from mmfree_jax.model import LanguageModel, State
from mmfree_jax.model.weights import as_weights
from mmfree_jax.model_config import ModelConfig


@dataclass(frozen=True)
class FixedForward:
    """The integer model; its parameters are `Quantized.arrays`."""

    config: ModelConfig
    numerics: Numerics

    def variables(self, params: Any) -> Any:
        """The arrays on the device."""
        return jax.tree.map(jnp.asarray, params)

    def hidden(
        self,
        variables: Any,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: State | None,
    ) -> tuple[jax.Array, State | None]:
        """Words of the residual stream, int32; the state's are kept in float32, which is exact."""
        config = self.config
        shape = (config.num_layers, tokens_BT.shape[0], config.hidden_size)
        h_LBD = jnp.zeros(shape, jnp.int32) if state is None else state.layers["h"]
        x_BTD, h_LBD = integer_model.hidden(
            variables, tokens_BT, segment_ids_BT, h_LBD, self.numerics
        )
        if state is None:
            return x_BTD, None
        return x_BTD, State(state.position_B, {"h": h_LBD.astype(jnp.float32)})

    def logits(self, variables: Any, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits: the integers over their power of two."""
        words = integer_model.logits(variables, x_BTD, self.numerics)
        frac = variables["final"]["frac/logits"].astype(jnp.float32)
        return words.astype(jnp.float32) * jnp.exp2(-frac)


def open_numerics(text: str) -> Variants:
    """The entry point `fixed` of `mmfree.numerics`.

    Raises:
      ConfigError: the text is malformed.
    """
    return functools.partial(variants, numerics=parse_numerics(text))


def variants(
    model: LanguageModel, params: Any, *, numerics: Numerics, steps: bool
) -> Iterator[Variant]:
    """The float model; with `steps` each switch of the numerics by itself; and all together.

    Raises:
      ConfigError: the hardware does not run this kind of model.
    """
    config = dataclasses.replace(model.config, bitlinear="fused")
    check_supported(config)
    variables = as_weights(params, config)
    yield Variant("as trained", "float", FloatForward(config), variables)
    tokens_BT = self_written(config, variables)
    rows = ladder(numerics) if steps else [("fixed point", numerics)]
    for name, own in rows:
        arrays = quantize(variables, config, own, tokens_BT).arrays
        yield Variant(name, format_numerics(own), FixedForward(config, own), arrays)

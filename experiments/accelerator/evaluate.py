"""Fixed-point numerics behind the interface of `mmfree eval`, and what each switch costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from mmfree_jax.config import ModelConfig
from mmfree_jax.evaluate.forward import FloatForward, Forward
from mmfree_jax.experiments.accelerator import integer_model
from mmfree_jax.experiments.accelerator.numerics import Numerics, format_numerics, ladder
from mmfree_jax.experiments.accelerator.quantized import check_supported, quantize, self_written
from mmfree_jax.infer.api import as_variables
from mmfree_jax.model import LanguageModel, State


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


@dataclass(frozen=True)
class Variant:
    """One way to compute a model: a name, the numerics as text, and what scoring needs."""

    name: str
    numerics: str
    forward: Forward
    params: Any


def variants(
    model: LanguageModel, params: Any, numerics: Numerics, *, steps: bool
) -> Iterator[Variant]:
    """The float model; with `steps` each switch of the numerics by itself; and all together.

    Raises:
      ConfigError: the hardware does not run this kind of model.
    """
    config = model.config
    check_supported(config)
    variables = as_variables(params, config)
    yield Variant("as trained", "float", FloatForward(config), variables)
    tokens_BT = self_written(config, variables)
    rows = ladder(numerics) if steps else [("fixed point", numerics)]
    for name, own in rows:
        arrays = quantize(variables, config, own, tokens_BT).arrays
        yield Variant(name, format_numerics(own), FixedForward(config, own), arrays)


def cost_table(rows: list[tuple[Variant, float]]) -> Table:
    """Loss of each variant, and its distance from the float model's and from fixed point alone."""
    table = Table(title="held-out loss by numerics", title_justify="left")
    table.add_column("numerics")
    for name in ("nats/token", "against float", "of this step"):
        table.add_column(name, justify="right")
    base = rows[0][1]
    for k, (variant, loss) in enumerate(rows):
        step = loss - rows[1][1] if variant.name.startswith("+") else None
        table.add_row(
            f"{variant.name} ({variant.numerics})",
            f"{loss:.4f}",
            "" if k == 0 else f"{loss - base:+.4f}",
            "" if step is None else f"{step:+.4f}",
        )
    return table

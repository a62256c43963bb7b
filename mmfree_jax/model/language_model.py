"""The language model: embedding, scanned blocks, final norm and head."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model import depth, functional, mup, packed_model
from mmfree_jax.model.block import Block, Period, rematted
from mmfree_jax.model.linear import Linear, NormScale, linears
from mmfree_jax.model.lookup import lookup
from mmfree_jax.model.mixer import OfLayer
from mmfree_jax.model.operations import Rows
from mmfree_jax.model.state import State
from mmfree_jax.model.weights import (
    Blended,
    DecodingWeights,
    Master,
    Packed,
    Ternary,
    Unstacked,
    collections,
)
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import constrain_batch


class Embedding(nn.Module):
    """Owns the embedding table [V, D], in full precision and not tied to the head."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the tokens' rows of the table, [B, T, D] in the residual dtype."""
        c = self.config
        table_VD = self.param(
            "weight",
            nn.initializers.normal(c.initializer_range),
            (c.vocab_size, c.hidden_size),
            jnp.dtype(c.param_dtype),
        )
        return lookup(table_VD, tokens_BT).astype(jnp.dtype(c.residual_dtype))


class LanguageModel(nn.Module):
    """A MatMul-free LM, or a Transformer++, or a mixture: see `ModelConfig`.

    `model.apply({"params": params}, tokens)` gives float32 logits, and so does `apply` of any of
    the three forms of weights. The parameter tree is listed in ARCHITECTURE.md.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens).shape
      (1, 3, 258)
    """

    config: ModelConfig

    @nn.nowrap
    def apply(
        self,
        weights: DecodingWeights | Blended | dict[str, Any],
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls a method on weights, by default `__call__`.

        Args:
          weights: in any form, or Flax's {"params": ...}.
          *args: of the method.
          method: of this class, or its name.
          **kwargs: of the method, and with weights that are not packed those of Flax's `apply`.
        """
        if isinstance(weights, Packed):
            name = method if isinstance(method, str) else getattr(method, "__name__", "__call__")
            return _OF_PACKED[name](weights, self.config, *args, **kwargs)
        if isinstance(weights, Unstacked):
            weights = collections(weights.rest) | {"layers": {"blocks": weights.blocks}}
        elif isinstance(weights, Master | Blended | Ternary):
            weights = collections(weights)
        return super().apply(weights, *args, method=method, **kwargs)

    def setup(self) -> None:
        """Names the parts; the layer loop is a scan over stacked parameters."""
        c = self.config
        self.embedding = Embedding(c)
        if c.bounded_layers and c.use_lower_bound:
            self.lower_bounds = self.param(
                "lower_bounds",
                nn.initializers.zeros,
                (c.bounded_layers, c.hidden_size),
                jnp.dtype(c.param_dtype),
            )
        periods = c.num_layers // len(c.period)
        alike = len(c.period) == 1
        scan = functools.partial(
            nn.scan,
            variable_axes={"params": 0, "ternary": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # type: ignore[arg-type]
            out_axes=0,
            length=periods,
            unroll=1 if c.scan_layers else periods,
        )
        self.blocks = scan(rematted(c))(c, c.period[0]) if alike else scan(Period)(c)
        self.final_norm = NormScale(c.param_dtype)
        self.head = Linear(
            c.vocab_size,
            c.head_linear,
            c.param_dtype,
            nn.initializers.normal(c.initializer_range * mup.head_scale(c)),
            weight_scale=c.weight_scale,
        )

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Next-token logits, [B, T, V] float32.

        Args:
          tokens_BT: int token ids below `vocab_size`.
          segment_ids_BT: documents within each row, from 1; 0 is padding. None: one a row.
        """
        x_BTD, _ = self.hidden(tokens_BT, segment_ids_BT)
        return self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        state: State | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, State | None]:
        """The residual stream after the last block, before the final norm.

        Args:
          tokens_BT: int token ids.
          segment_ids_BT: documents within each row, from 1; 0 is padding on the right.
          state: to go on from (see `init_state`); None: start afresh and return none.
          fresh: the state is one that has read nothing, and each row one document, so that
            attention need look at nothing but these tokens.

        Returns:
          [B, T, D] in the residual dtype, and the state after each row's last token that is
          not padding.
        """
        c = self.config
        T = tokens_BT.shape[1]
        start_B = jnp.zeros(tokens_BT.shape[0], jnp.int32) if state is None else state.position_B
        positions_BT = None if fresh else start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        reset_BT = padding_BT = None
        if segment_ids_BT is not None:
            reset_BT, padding_BT = functional.document_edges(segment_ids_BT)
        lower_bounds_ME = None
        if c.bounded_layers:
            lower_bounds_ME = (
                functional.forget_gate_lower_bounds(self.lower_bounds)
                if c.use_lower_bound
                else jnp.zeros((c.bounded_layers, c.state_size))
            )
        of_layers = depth.of_layers(c, lower_bounds_ME)
        run: Any = self.blocks
        given: Any = of_layers
        if self.has_variable("layers", "blocks"):
            run = functools.partial(_one_by_one, c, self.get_variable("layers", "blocks"))
        elif len(c.period) == 1:
            (given,) = of_layers
        x_BTD, layers = run(
            constrain_batch(self.embedding(tokens_BT)),
            Rows(positions_BT, segment_ids_BT, reset_BT, padding_BT, self._strength()),
            given,
            None if state is None else state.layers,
        )
        if state is None:
            return x_BTD, None
        length_B = T if padding_BT is None else jnp.sum(~padding_BT, axis=1, dtype=jnp.int32)
        return x_BTD, State(start_B + length_B, layers or {})

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and head on the residual stream: [..., V] float32."""
        c = self.config
        head, norm_scale_D = self.head(c.hidden_size), self.final_norm(c.hidden_size)
        _, (logits_BTV,) = linears(
            c, [head], x_BTD, outer_norm=norm_scale_D, strength=self._strength()
        )
        return logits_BTV.astype(jnp.float32)

    def _strength(self) -> jax.Array | None:
        """Of the activations' quantisers where it is given; None: 1."""
        given = self.has_variable("quantizers", "strength")
        return self.get_variable("quantizers", "strength") if given else None

    def decode(
        self,
        tokens_BT: jax.Array,
        state: State,
        segment_ids_BT: jax.Array | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, State]:
        """Consumes tokens and predicts what follows each row's last one.

        T = 1 is one step of generation; T > 1 reads a prompt (0 in segment_ids marks padding
        on the right of shorter ones); `fresh` as in `hidden`.

        Returns:
          [B, V] float32 logits after the last token that is not padding, and the new state.
        """
        x_BTD, new_state = self.hidden(tokens_BT, segment_ids_BT, state, fresh=fresh)
        assert new_state is not None  # a state went in
        last_B = new_state.position_B - state.position_B - 1
        x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
        return self.logits(x_BD), new_state


def _one_by_one(
    config: ModelConfig,
    blocks: Sequence[Master | Ternary],
    x_BTD: jax.Array,
    rows: Rows,
    of_layers: tuple[OfLayer, ...],
    states: Any,
) -> tuple[jax.Array, Any]:
    """The scan over blocks on `Unstacked` weights; states are a tuple, a stack or None."""
    stacked = isinstance(states, dict)
    if stacked:
        states = depth.unstack(states, config)
    length, new = len(config.period), []
    for layer, (mixer, weights) in enumerate(zip(config.layer_mixers, blocks, strict=True)):
        x_BTD, state = Block(config, mixer, parent=None).apply(  # type: ignore[misc]
            collections(weights),
            x_BTD,
            rows,
            jax.tree.map(operator.itemgetter(layer // length), of_layers[layer % length]),
            None if states is None else states[layer],
        )
        new.append(state)
    if states is None:
        return x_BTD, None
    return x_BTD, depth.stack(new, config) if stacked else tuple(new)


# What `apply` runs for packed weights, whose arrays are no Flax variables.
_OF_PACKED: dict[str, Callable[..., Any]] = {
    "__call__": packed_model.forward,
    "hidden": packed_model.hidden,
    "logits": packed_model.logits,
    "decode": packed_model.decode,
}

"""What scoring asks of a model: hidden states, and logits of some of them."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from mmfree_jax.model import LanguageModel, State
from mmfree_jax.model.weights import as_weights
from mmfree_jax.model_config import ModelConfig


class Forward(Protocol):
    """A hashable description of how to compute; the arrays are given to each call."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        ...

    def variables(self, params: Any) -> Any:
        """`params` as the methods below read them."""
        ...

    def hidden(
        self,
        variables: Any,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: State | None,
    ) -> tuple[jax.Array, State | None]:
        """As `LanguageModel.hidden`."""
        ...

    def logits(self, variables: Any, x_BTD: jax.Array) -> jax.Array:
        """As `LanguageModel.logits`."""
        ...


@dataclass(frozen=True)
class FloatForward:
    """The model as it was trained."""

    config: ModelConfig

    def variables(self, params: Any) -> Any:
        """Ternarises a plain parameter tree, once."""
        return as_weights(params, self.config)

    def hidden(
        self,
        variables: Any,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: State | None,
    ) -> tuple[jax.Array, State | None]:
        """As `LanguageModel.hidden`."""
        model = LanguageModel(self.config)
        return model.apply(variables, tokens_BT, segment_ids_BT, state, method=LanguageModel.hidden)

    def logits(self, variables: Any, x_BTD: jax.Array) -> jax.Array:
        """As `LanguageModel.logits`."""
        return LanguageModel(self.config).apply(variables, x_BTD, method=LanguageModel.logits)

"""The model: thin Linen modules over plain functions."""

from mmfree_jax.model.language_model import LanguageModel
from mmfree_jax.model.state import Session, State, init_state
from mmfree_jax.model.ternary import ternary_weights

__all__ = ["LanguageModel", "Session", "State", "init_state", "ternary_weights"]

"""The model: thin Linen modules over plain functions."""

from mmfree_jax.model.language_model import LanguageModel
from mmfree_jax.model.state import Session, State, init_state
from mmfree_jax.model.weights import Master, Packed, Ternary, as_weights, training_weights

__all__ = [
    "LanguageModel",
    "Master",
    "Packed",
    "Session",
    "State",
    "Ternary",
    "as_weights",
    "init_state",
    "training_weights",
]

"""Decoding and sampling."""

from mmfree_jax.infer.api import Output, generate, prefill
from mmfree_jax.infer.decode import Session, fork, replace_rows, select_rows
from mmfree_jax.infer.sample import Sampling
from mmfree_jax.infer.text import TextOutput, TextStream, generate_text, sample_text
from mmfree_jax.model.weights import as_weights
from mmfree_jax.saved.pretrained import load_model
from mmfree_jax.saved.session import load_session, save_session

__all__ = [
    "Output",
    "Sampling",
    "Session",
    "TextOutput",
    "TextStream",
    "as_weights",
    "fork",
    "generate",
    "generate_text",
    "load_model",
    "load_session",
    "prefill",
    "replace_rows",
    "sample_text",
    "save_session",
    "select_rows",
]

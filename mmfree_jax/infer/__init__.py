"""Decoding and sampling."""

from mmfree_jax.infer.api import Output, as_variables, generate, prefill
from mmfree_jax.infer.decode import (
    Session,
    fork,
    inference_variables,
    replace_rows,
    select_rows,
)
from mmfree_jax.infer.sample import Sampling
from mmfree_jax.infer.text import TextOutput, TextStream, generate_text, sample_text
from mmfree_jax.saved.load import load_model
from mmfree_jax.saved.session import load_session, save_session

__all__ = [
    "Output",
    "Sampling",
    "Session",
    "TextOutput",
    "TextStream",
    "as_variables",
    "fork",
    "generate",
    "generate_text",
    "inference_variables",
    "load_model",
    "load_session",
    "prefill",
    "replace_rows",
    "sample_text",
    "save_session",
    "select_rows",
]

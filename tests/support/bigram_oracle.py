"""A model whose every probability is known: a table of bigrams, and lm-eval's view of it."""

import jax
import jax.numpy as jnp
import numpy as np
from initial_params import initial_params

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.evaluate import harness
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import DENSE, ModelConfig

VOCAB = ByteTokenizer.vocab_size
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=VOCAB,
    num_layers=1,
    intermediate_size=4,
    mixer_linear=DENSE,
    glu_linear=DENSE,
    head_linear=DENSE,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)


def bigram_logits(sign=1.0):
    """Logits of the next byte given the last: the next letter is likely, and x before a space."""
    table = np.zeros((VOCAB, VOCAB))
    for letter in range(ord("a"), ord("z")):
        table[letter, letter + 1] = 6 * sign
    table[ord("x"), ord(" ")] = 9 * sign
    table[ByteTokenizer.bos_id, ord("a")] = 4
    return table


def oracle_params(table):
    """Blocks that add nothing, one-hot embeddings, and the table as the head."""
    model = LanguageModel(CONFIG)
    params = initial_params(CONFIG)
    params = jax.tree.map(jnp.zeros_like, params)
    # High enough that the norm's eps does not matter.
    params["embedding"]["weight"] = 100 * jnp.eye(VOCAB)
    params["final_norm"]["scale"] = jnp.ones(VOCAB)
    # RMSNorm makes a one-hot vector sqrt(VOCAB) high.
    params["head"]["weight"] = jnp.asarray(table.T / np.sqrt(VOCAB), jnp.float32)
    return model, params


def make_adapter(sign=1.0, **settings):
    model, params = oracle_params(bigram_logits(sign))
    settings = {"show_progress": False, "max_length": 256} | settings
    return harness.HarnessModel(model, params, ByteTokenizer(), **settings)

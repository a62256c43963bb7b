"""Maximal update parametrisation (muP; Yang et al., arXiv 2203.03466): what width changes.

With it the best learning rate of one width is about that of every other. Of a model m times as
wide as the one where it changes nothing (`ModelConfig.mup_base_width`), under Adam, as in the
paper's table 3:

                                        initial size    learning rate
  embedding, norms' scales, bounds,
  kernels of short convolutions         1               1
  matrices of mixer and GLU             m^-1/2          1 / m
  head                                  1 / m           1 / m

Scores of attention are to be divided by the channels of a head and not by their square root: the
initial size and the rate of q_proj have a further factor (channels / those at the base)^-1/2, and
the division stays as it is. A multiplier of the logits, which other texts use, would be the same:
under Adam a factor on a matrix's output is one on its initial size and its rate. So the forward
pass is that of any model, and saved models, exports and packed weights know nothing of muP.

Ternary layers: docs/mup.md has how far the rules hold for their master weights.
"""

from mmfree_jax.model_config import ModelConfig


def width_ratio(config: ModelConfig) -> float:
    """m; 1 without muP."""
    return config.hidden_size / config.mup_base_width if config.mup else 1.0


def hidden_scale(config: ModelConfig) -> float:
    """Factor of a matrix's standard deviation at initialisation, in mixer and GLU."""
    return width_ratio(config) ** -0.5


def head_scale(config: ModelConfig) -> float:
    """Factor of the head's."""
    return 1 / width_ratio(config)


def query_scale(config: ModelConfig) -> float:
    """Further factor of q_proj's, and of its rate."""
    if not config.mup or config.head_dim is not None:  # heads as wide as at the base
        return 1.0
    base = config.mup_base_width
    heads = config.num_heads if config.num_heads is not None else max(1, base // 64)
    return (config.hidden_size / config.attention_heads / (base / heads)) ** -0.5


def rate_scale(config: ModelConfig, path: tuple[str, ...]) -> float:
    """Factor of the learning rate of the parameter at `path` (ARCHITECTURE.md)."""
    if path[-1] != "weight" or path[0] == "embedding":
        return 1.0
    return (query_scale(config) if "q_proj" in path else 1.0) / width_ratio(config)

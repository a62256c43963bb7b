"""How far an export's predictions are from the model's own, on text.

Shapes: W windows of text, T tokens in each, D hidden channels, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.errors import CheckpointError, DataError
from mmfree_jax.export import onnx_session
from mmfree_jax.export.onnx_session import OnnxModel
from mmfree_jax.infer import as_weights, generate
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import Params, Weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.readable import perplexity


@dataclass(frozen=True)
class Agreement:
    """Two models' predictions of the same tokens.

    Attributes:
      tokens: predicted.
      kl: mean over them of KL(model || export), nats.
      same_top: share of them where both find the same token likeliest.
      perplexity: of the model in float32.
      export_perplexity: of the export.
      largest_difference: of two logits.
    """

    tokens: int
    kl: float
    same_top: float
    perplexity: float
    export_perplexity: float
    largest_difference: float

    def __str__(self) -> str:
        change = 100 * (self.export_perplexity / self.perplexity - 1)
        return (
            f"{self.tokens:,} tokens: KL {self.kl:.2e} nats, same likeliest token "
            f"{100 * self.same_top:.2f}%, perplexity {self.perplexity:.3f} -> "
            f"{self.export_perplexity:.3f} ({change:+.3f}%), largest difference of two logits "
            f"{self.largest_difference:.2e}"
        )


def compare(
    model: LanguageModel, params: Params | Weights, export: OnnxModel, tokens_WT: np.ndarray
) -> Agreement:
    """Compares an export with the model in float32, on windows that each start afresh.

    The export reads token by token, as it does when it writes.

    Args:
      model: its compute dtype is set aside.
      params: its parameters, or what `as_weights` made of them.
      export: loaded.
      tokens_WT: int, at least two tokens in each window.

    Raises:
      DataError: windows of one token, tokens that the model does not have, or an export of
        another model.
      CheckpointError: logits of either that are not finite.
    """
    if (found := export.manifest["vocab_size"]) != model.config.vocab_size:
        raise DataError(
            f"the export has {found} tokens, the model {model.config.vocab_size}: it is of another "
            "model"
        )
    W, T = tokens_WT.shape
    if T < 2 or W < 1:
        raise DataError(f"the text has {W} windows of {T} tokens: give one of two tokens or more")
    if tokens_WT.min() < 0 or tokens_WT.max() >= model.config.vocab_size:
        raise DataError(
            f"the text has token id {tokens_WT.max()}: the model's ids go from 0 to "
            f"{model.config.vocab_size - 1}"
        )
    config = dataclasses.replace(
        model.config, compute_dtype="float32", residual_dtype="float32", remat="none"
    )
    variables = as_weights(params, config)
    hidden_WTD, _ = _hidden(variables, jnp.asarray(tokens_WT, jnp.int32), config=config)
    state = export.start(W)
    kl = same = loss = export_loss = largest = 0.0
    for t in range(T - 1):
        own_WV = np.asarray(_logits(variables, hidden_WTD[:, t], config=config), np.float64)
        found_WV, state = export.step(tokens_WT[:, t : t + 1], state)
        found_WV = found_WV.astype(np.float64)
        for whose, logits_WV in (("model", own_WV), ("export", found_WV)):
            if not np.isfinite(logits_WV).all():
                raise CheckpointError(
                    f"the {whose}'s logits are not finite at token {t}: its weights are damaged"
                )
        largest = max(largest, float(np.abs(own_WV - found_WV).max()))
        own_WV, found_WV = _log_softmax(own_WV), _log_softmax(found_WV)
        kl += float(np.sum(np.exp(own_WV) * (own_WV - found_WV)))
        same += float(np.sum(own_WV.argmax(-1) == found_WV.argmax(-1)))
        targets = (np.arange(W), tokens_WT[:, t + 1])
        loss -= float(own_WV[targets].sum())
        export_loss -= float(found_WV[targets].sum())
    count = W * (T - 1)
    return Agreement(
        count,
        kl / count,
        same / count,
        perplexity(loss / count),
        perplexity(export_loss / count),
        largest,
    )


def same_continuations(
    model: LanguageModel,
    params: Params | Weights,
    export: OnnxModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
) -> list[int]:
    """Tokens that the greedy continuations have in common with those of `generate`.

    Args:
      model: in its own compute dtype.
      params: its parameters, or what `as_weights` made of them.
      export: loaded.
      prompts: token ids.
      new_tokens: of each continuation.

    Returns:
      For each prompt the tokens before the first that differs; `new_tokens` where none does.
    """
    out = generate(model, params, prompts, max_new_tokens=new_tokens, temperature=0)
    counts = []
    for prompt, want in zip(prompts, out.tokens, strict=True):
        found = onnx_session.greedy(export, prompt)
        same = [a == b for a, b in zip(found, want, strict=False)]
        counts.append([*same, False].index(False))
    return counts


@functools.partial(jax.jit, static_argnames="config")
def _hidden(variables: Weights, tokens_WT: jax.Array, *, config: ModelConfig) -> Any:
    return LanguageModel(config).apply(variables, tokens_WT, method=LanguageModel.hidden)


@functools.partial(jax.jit, static_argnames="config")
def _logits(variables: Weights, x_WD: jax.Array, *, config: ModelConfig) -> Any:
    return LanguageModel(config).apply(variables, x_WD, method=LanguageModel.logits)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), -1, keepdims=True))

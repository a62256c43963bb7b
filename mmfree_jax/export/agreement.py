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


@dataclass
class LogitSums:
    """Sums over predicted tokens of what an `Agreement` is made of, as they are added up."""

    tokens: int = 0
    kl: float = 0.0
    same: float = 0.0
    loss: float = 0.0
    other_loss: float = 0.0
    largest: float = 0.0

    def add(self, own_NV: np.ndarray, other_NV: np.ndarray, targets_N: np.ndarray) -> None:
        """Adds N predictions.

        Args:
          own_NV: logits of the model.
          other_NV: of what is compared with it.
          targets_N: the tokens that came.
        """
        own_NV, other_NV = own_NV.astype(np.float64), other_NV.astype(np.float64)
        self.largest = max(self.largest, float(np.abs(own_NV - other_NV).max()))
        own_NV, other_NV = _log_softmax(own_NV), _log_softmax(other_NV)
        self.kl += float(np.sum(np.exp(own_NV) * (own_NV - other_NV)))
        self.same += float(np.sum(own_NV.argmax(-1) == other_NV.argmax(-1)))
        at = (np.arange(len(targets_N)), targets_N)
        self.loss -= float(own_NV[at].sum())
        self.other_loss -= float(other_NV[at].sum())
        self.tokens += len(targets_N)

    def agreement(self) -> Agreement:
        """The means over what was added."""
        return Agreement(
            self.tokens,
            self.kl / self.tokens,
            self.same / self.tokens,
            perplexity(self.loss / self.tokens),
            perplexity(self.other_loss / self.tokens),
            self.largest,
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
    sums = LogitSums()
    for t in range(T - 1):
        own_WV = np.asarray(_logits(variables, hidden_WTD[:, t], config=config))
        found_WV, state = export.step(tokens_WT[:, t : t + 1], state)
        for whose, logits_WV in (("model", own_WV), ("export", found_WV)):
            if not np.isfinite(logits_WV).all():
                raise CheckpointError(
                    f"the {whose}'s logits are not finite at token {t}: its weights are damaged"
                )
        sums.add(own_WV, found_WV, tokens_WT[:, t + 1])
    return sums.agreement()


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

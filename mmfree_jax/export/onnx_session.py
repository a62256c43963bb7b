"""An exported folder in onnxruntime: reading prompts, and greedy or sampled continuation."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.errors import CheckpointError, DataError
from mmfree_jax.export import manifest as manifests
from mmfree_jax.export.tokens import check_tokens
from mmfree_jax.installed import import_optional, install_command

# Tokens of a prompt that are read at once: memory stays bounded, and products fill the cores.
CHUNK = 64


@dataclass(frozen=True)
class OnnxModel:
    """An exported model, loaded.

    Attributes:
      manifest: of the folder.
      session: onnxruntime's.
    """

    manifest: dict[str, Any]
    session: Any

    def start(self, batch: int = 1) -> np.ndarray:
        """The state before the first token, [L, B, E] float32."""
        layers, _, width = self.manifest["state_shape"]
        return np.zeros((layers, batch, width), np.float32)

    def step(self, tokens_BT: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits [B, V] after the last of the tokens, and the new state.

        Raises:
          DataError: no whole numbers, or ids that the model does not have.
        """
        tokens_BT = check_tokens(np.asarray(tokens_BT), self.manifest["vocab_size"])
        feeds = {"tokens": tokens_BT.astype(np.int64), "state": state}
        logits_BV, state = self.session.run(["logits", "next_state"], feeds)
        return logits_BV, state


def load(
    folder: str | os.PathLike[str],
    *,
    threads: int = 0,
    checksums: bool = True,
    graph: str = "graph",
) -> OnnxModel:
    """Loads an exported folder.

    Args:
      folder: that `mmfree export onnx` wrote.
      threads: of the runtime; 0: one a core.
      checksums: compare every file with its checksum, not only its size.
      graph: which graph: "graph", or "web_graph" for the one without two-bit products.

    Raises:
      ConfigError: onnxruntime is not installed, does not work, or is too old.
      CheckpointError: a file is missing, truncated or altered, or the runtime refuses it.
    """
    onnxruntime = import_optional("onnxruntime", "an ONNX export", install_command("edge"))
    manifest = manifests.read(folder)
    manifests.check_runtime(onnxruntime.__version__, manifest)
    manifests.verify(folder, manifest, checksums=checksums)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    path = Path(folder) / manifest[graph]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises many kinds, none documented
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{path} is refused by onnxruntime: {reason}") from e
    return OnnxModel(manifest, session)


def prefill(
    model: OnnxModel, tokens: Sequence[int], state: np.ndarray, *, chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a prompt in chunks.

    Args:
      model: loaded.
      tokens: at least one.
      state: [L, 1, E] to go on from.
      chunk: most tokens at once.

    Returns:
      Logits [V] after the last token, and the new state.

    Raises:
      DataError: no token, or one that the model does not have.
    """
    vocabulary = model.manifest["vocab_size"]
    if not tokens:
        raise DataError("the prompt is empty: give at least one token")
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise DataError(
                f"the prompt has token id {token}: the model's ids go from 0 to {vocabulary - 1}"
            )
    logits_BV = np.empty(0)
    for first in range(0, len(tokens), chunk):
        logits_BV, state = model.step(np.array([tokens[first : first + chunk]]), state)
    return logits_BV[0], state


def greedy(
    model: OnnxModel, prompt: Sequence[int], *, chunk: int = CHUNK, state: np.ndarray | None = None
) -> Iterator[int]:
    """The likeliest continuation of a prompt, token by token and without end.

    Raises:
      DataError: as `prefill`.
      CheckpointError: the model gives logits that are not finite, of which none is the likeliest.
    """
    state = model.start() if state is None else state
    logits_V, state = prefill(model, prompt, state, chunk=chunk)
    while True:
        if not np.isfinite(logits_V).all():
            raise CheckpointError(
                "the model's logits are not finite: its weights are damaged, export a sound one"
            )
        token = int(np.argmax(logits_V))
        yield token
        logits_BV, state = model.step(np.array([[token]]), state)
        logits_V = logits_BV[0]

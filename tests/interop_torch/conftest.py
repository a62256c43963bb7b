"""Exports as real torch and transformers load them. `make torch` makes the environment for it."""

import importlib.util
import os
import tempfile

# Before transformers is imported: it copies the code of a loaded folder into its cache.
if importlib.util.find_spec("torch"):
    _CACHE = tempfile.TemporaryDirectory(prefix="mmfree-torch-")
    os.environ |= {"HF_HOME": _CACHE.name, "HF_HUB_OFFLINE": "1"}

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.convert import export_hf
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.pretrained import load_pretrained


@dataclass(frozen=True)
class Exported:
    """One model on both sides.

    Attributes:
      ours: folder that was exported.
      folder: of the export.
      model, params: as `load_pretrained` gives them, in float32.
    """

    ours: Path
    folder: Path
    model: LanguageModel
    params: dict[str, Any]

    def torch_model(self, **options: Any) -> Any:
        """The export as transformers loads it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True, **options)

    def logits(self, tokens: Any) -> np.ndarray:
        """Ours, [B, T, V] float32."""
        call = jax.jit(lambda params, t: self.model.apply({"params": params}, t))
        return np.asarray(call(self.params, jnp.asarray(tokens, jnp.int32)))


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of which none is as initialised: norms, bounds and gates differ by channel."""
    shapes = jax.eval_shape(
        LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> np.ndarray:
        is_scale = "scale" in jax.tree_util.keystr(path)
        return (rng.normal(size=x.shape) * 0.3 + is_scale).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """(config) -> a model of random weights, exported."""

    def make(config: ModelConfig) -> Exported:
        root = tmp_path_factory.mktemp("export")
        (root / "ours").mkdir()
        write_model(root / "ours", config, random_params(config))
        export_hf(root / "ours", root / "hf")
        return Exported(root / "ours", root / "hf", *load_pretrained(root / "ours"))

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Exported:
    """A byte model that has learnt a few words, exported with its tokenizer."""
    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    words = ["we", "hold", "these", "truths", "to", "be", "self", "evident", "that", "all", "are"]
    texts = (" ".join(rng.choice(words, rng.integers(5, 40))) for _ in range(400))
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for command in (
        f"data prepare --input {root}/texts.jsonl --tokenizer byte --out {root}/data",
        f"train --preset tiny --data.paths {root}/data --run-dir {root}/run --steps 120"
        " --batch-size 16 --data.seq-len 64 --model.num-layers 3 --eval.batches 0"
        " --eval.sample-tokens 0 --log.no-tensorboard --log.progress none",
    ):
        assert main(command.split()) == 0
    export_hf(root / "run", root / "hf")
    return Exported(root / "run", root / "hf", *load_pretrained(root / "run"))

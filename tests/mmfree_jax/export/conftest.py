"""An export's page and a browser to open it in."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from initial_params import initial_params
from page_tokenizers import make_tokenizers

from mmfree_jax.data import tokenizer as tokenizer_lib
from mmfree_jax.experiments.bench.browser import Site, build_page, chromium
from mmfree_jax.export import onnx_export
from mmfree_jax.model_config import ModelConfig


def _export(folder: Path, tokenizer: tokenizer_lib.Tokenizer, save_model: Any) -> Path:
    """An export of a model with random weights."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_layers=2,
        intermediate_size=96,
        compute_dtype="float32",
        residual_dtype="float32",
        remat="none",
    )
    params = initial_params(config, 1)
    tokenizer.save(folder / "tokenizer")
    source = save_model(folder / "zufällig 🎲", config, params, folder / "tokenizer")
    onnx_export.export_onnx(source, folder / "export")
    return folder / "export"


@pytest.fixture(scope="session")
def site(tmp_path_factory, save_model):
    """An export with its page as `npm ci && npm run build` leave it."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: apt-get install npm")
    folder = _export(tmp_path_factory.mktemp("web"), make_tokenizers()["sentencepiece"], save_model)
    build_page(folder / "web")
    with Site(folder, folder) as site:
        yield site


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser

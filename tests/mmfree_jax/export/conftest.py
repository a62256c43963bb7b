"""An export's page and a browser to open it in."""

import shutil

import pytest
from onnx_folders import random_export
from page_tokenizers import make_tokenizers

from mmfree_jax.experiments.bench.browser import Site, build_page, chromium


@pytest.fixture(scope="session")
def site(tmp_path_factory, save_model):
    """An export with its page as `npm ci && npm run build` leave it."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: apt-get install npm")
    tokenizer = make_tokenizers()["sentencepiece"]
    folder, _ = random_export(tmp_path_factory.mktemp("web"), tokenizer, save_model)
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

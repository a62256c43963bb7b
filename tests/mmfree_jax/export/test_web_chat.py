"""The web page of an export, in a real headless Chromium, against onnxruntime in Python."""

import functools
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sentencepiece
import tokenizers

from mmfree_jax.cli.main import main
from mmfree_jax.config import ModelConfig
from mmfree_jax.data import tokenizer as tokenizer_lib
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import DataError
from mmfree_jax.experiments.bench import browser as browser_lib
from mmfree_jax.experiments.bench.browser import (
    Site,
    answer,
    build_page,
    chromium,
    configure,
    show,
    text_of,
    type_prompt,
    wait,
)
from mmfree_jax.export import onnx_export, onnx_session, web_page, web_tokenizer
from mmfree_jax.model import LanguageModel

pytestmark = pytest.mark.timeout(180)

TEXTS = [
    "We hold these truths to be self-evident, that all are created equal. " * 3,
    "My fellow citizens, the state of our union is strong;\n\tso is  our café 日本.\n\n",
]
HARD = [
    *web_tokenizer.CHECKS,
    "",
    " ",
    "\x00\x7f",
    *(a + b + c for a, b, c in itertools.product(("e", " ", "\n", "🙂"), ("", "  ", "é"), "a. 日")),
    *(character * n for character in " =ao\n▁" for n in (2, 3, 5, 7, 11, 16, 33)),
]
PROMPT, SECOND = "My fellow citizens, café 日本", " so is our union"


def sentencepiece_model(**options) -> tokenizer_lib.SentencePieceTokenizer:
    """A model of the kind of Mistral's: BPE, bytes for what it does not know, text as it is."""
    kind = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 330,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **(kind | options)
    )
    return tokenizer_lib.SentencePieceTokenizer(model.getvalue())


@functools.cache
def make_tokenizers() -> dict[str, tokenizer_lib.Tokenizer]:
    return {
        "byte": tokenizer_lib.ByteTokenizer(),
        "bpe": train_bpe(TEXTS, 300),
        "sentencepiece": sentencepiece_model(),
        "no dummy prefix": sentencepiece_model(add_dummy_prefix=False),
    }


# ---- the tokenizer's file, without a browser


def check_file(tokenizer, texts):
    spec = web_tokenizer.browser_tokenizer(tokenizer)
    encoder = tokenizers.Tokenizer.from_str(json.dumps(spec["encoder"]))
    for text in texts:
        ids = encoder.encode(text, add_special_tokens=False).ids if text else []
        assert ids == tokenizer.encode(text), text


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "no dummy prefix"])
def test_the_rewritten_tokenizer_gives_the_same_ids(name):
    check_file(make_tokenizers()[name], HARD)


def test_mistrals_tokenizer_is_rewritten_exactly(mistral_model):
    mistral = tokenizer_lib.load_tokenizer(mistral_model)
    check_file(mistral, HARD)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model_type": "unigram"}, "model type 1"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character map"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"user_defined_symbols": ["union"]}, "user-defined pieces"),
    ],
)
def test_tokenizers_that_the_page_cannot_match_are_refused(options, word):
    with pytest.raises(DataError, match=word):
        web_tokenizer.browser_tokenizer(sentencepiece_model(vocab_size=310, **options))


def test_a_tokenizer_json_of_another_kind_is_refused():
    other = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}))
    tokenizer = tokenizer_lib.JsonTokenizer(other.to_str().encode())
    with pytest.raises(DataError, match="WordPiece"):
        web_tokenizer.browser_tokenizer(tokenizer)


def test_every_file_of_the_page_is_copied():
    folder = Path(web_page.__file__).parent / "web"
    assert {path.name for path in folder.iterdir() if path.is_file()} == set(web_page.FILES)


# ---- the browser


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
    params = LanguageModel(config).init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    tokenizer.save(folder / "tokenizer")
    source = save_model(folder / "random", config, params, folder / "tokenizer")
    onnx_export.export_onnx(source, folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def site(tmp_path_factory, save_model):
    """An export with its page as `npm ci && npm run build` leave it."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: apt-get install npm")
    folder = _export(tmp_path_factory.mktemp("web"), make_tokenizers()["sentencepiece"], save_model)
    build_page(folder / "web")
    with Site(folder, folder) as site:
        yield site


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def send(browser, text: str) -> list[int]:
    """Types a prompt; returns the tokens of the answer."""
    type_prompt(browser, text)
    return answer(browser)


@pytest.mark.parametrize("query", ["", "?threads=1"])
def test_the_page_streams_what_python_generates(site, browser, query):
    tokenizer = make_tokenizers()["sentencepiece"]
    model = onnx_session.load(site.folder)
    first = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    expected = list(itertools.islice(onnx_session.greedy(model, first), 40))
    both = [*first, *expected, *tokenizer.encode(SECOND)]
    expected_second = list(itertools.islice(onnx_session.greedy(model, both), 30))

    browser.get_log("browser")
    assert show(browser, site, query) == "ready", text_of(browser, "error")
    if query:
        assert text_of(browser, "threads") == "1"
    else:
        cores = browser.execute_script("return navigator.hardwareConcurrency")
        assert browser.execute_script("return crossOriginIsolated")
        assert text_of(browser, "threads") == str(min(4, cores))
    configure(browser, temperature=0, max_tokens=40)
    assert send(browser, PROMPT) == expected
    text = tokenizer.decode(first + expected).removeprefix(tokenizer.decode(first))
    shown = browser.execute_script("return document.querySelector('.answer').textContent")
    assert shown.replace("\ufffd", "") == text.replace("\ufffd", "")
    assert re.fullmatch(r"[\d.]+ tokens/s", text_of(browser, "speed"))
    assert text_of(browser, "read") == str(len(first) + 40)
    assert text_of(browser, "state").startswith("1 kB")

    # The state carries over, and nothing of it is left behind Reset.
    configure(browser, max_tokens=30)
    assert send(browser, SECOND) == expected_second
    browser.find_element("id", "reset").click()
    assert text_of(browser, "log") == ""
    assert send(browser, PROMPT) == expected[:30]
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_stop_ends_an_answer_and_the_next_prompt_goes_on(site, browser, monkeypatch):
    # Without an end token, so that nothing but Stop ends the answer.
    endless = {"export.json": _manifest(site, eos_token_id=None, end_ids=[])}
    monkeypatch.setattr(site, "instead", endless)
    assert show(browser, site) == "ready", text_of(browser, "error")
    configure(browser, temperature=0, max_tokens=100000)
    type_prompt(browser, PROMPT)
    # Text is there while the answer goes on.
    script = """
        const [done] = arguments;
        (function look() {
          if (document.querySelector(".answer")?.textContent) done(document.body.dataset.state);
          else setTimeout(look, 5);
        })();
    """
    assert browser.execute_async_script(script) == "busy"
    browser.find_element("id", "stop").click()
    assert wait(browser, "ready", "failed") == "ready"
    assert "[stopped]" in text_of(browser, "log")
    tokens = browser.find_element("class name", "answer").get_attribute("data-tokens")

    tokenizer, model = make_tokenizers()["sentencepiece"], onnx_session.load(site.folder)
    generated = [int(i) for i in tokens.split(",") if i]
    so_far = [tokenizer.bos_id, *tokenizer.encode(PROMPT), *generated]
    configure(browser, max_tokens=5)
    expected = onnx_session.greedy(model, [*so_far, *tokenizer.encode(SECOND)])
    assert send(browser, SECOND) == list(itertools.islice(expected, 5))


def test_sampling_follows_its_seed_and_top_k(site, browser):
    assert show(browser, site) == "ready", text_of(browser, "error")
    answers = []
    for seed, top_k in ((1, 0), (1, 0), (2, 0), (1, 1)):
        configure(browser, temperature=1, max_tokens=20, seed=seed, top_k=top_k)
        answers.append(send(browser, PROMPT))
        browser.find_element("id", "reset").click()
    configure(browser, temperature=0)
    assert answers[0] == answers[1] != answers[2]
    assert answers[3] == send(browser, PROMPT)


def test_tokenizers_give_pythons_ids_and_bytes_in_the_browser(site, browser):
    show(browser, site)
    script = """
        const [spec, texts, done] = arguments;
        Promise.all([import("./tokenizer.js"), import("./vendor/tokenizers.min.mjs")])
          .then(([page, library]) => {
            const tokenizer = page.makeTokenizer(spec, library);
            done(texts.map((text) => {
              const ids = tokenizer.encode(text);
              const stream = new page.TextStream(tokenizer, tokenizer.stripSpace);
              return [ids, ids.map((id) => stream.push(id)).join("") + stream.flush()];
            }));
          })
          .catch((error) => done(String(error)));
    """
    for name, tokenizer in make_tokenizers().items():
        spec = web_tokenizer.browser_tokenizer(tokenizer)
        found = browser.execute_async_script(script, spec, HARD)
        expected = [[ids, tokenizer.decode(ids)] for ids in map(tokenizer.encode, HARD)]
        assert found == expected, name


def _manifest(site: Site, **changes) -> bytes:
    manifest = json.loads((site.folder / "export.json").read_text())
    return json.dumps(manifest | changes).encode()


def test_what_is_wrong_with_the_files_is_said(site, browser, monkeypatch):
    data = (site.folder / "model.onnx.data").read_bytes()
    graph = json.loads((site.folder / "export.json").read_text())["web_graph"]
    tokenizer = json.loads((site.folder / "web" / "tokenizer.json").read_text())
    tokenizer["checks"][0][1][0] += 1
    old = b"export const env = {versions: {common: '1.23.2', web: '1.23.2'}, wasm: {}};"
    worker = (site.folder / "web" / "worker.js").read_bytes()
    no_simd = b"WebAssembly.validate = () => false;\n" + worker
    faults = {
        "model.onnx.data has 1000 bytes": {"model.onnx.data": data[:1000]},
        "model.onnx.data does not have the checksum": {
            "model.onnx.data": data[:-1] + bytes([data[-1] ^ 1])
        },
        f"{graph} is missing (HTTP 404": {graph: None},
        "export.json is missing": {"export.json": None},
        "export.json is not JSON": {"export.json": b'{"format": '},
        "export.json is of format mmfree-onnx 9": {"export.json": _manifest(site, version=9)},
        "other ids here than in Python": {"web/tokenizer.json": json.dumps(tokenizer).encode()},
        "npm ci && npm run build": {"web/vendor/ort.wasm.min.mjs": None},
        "no WebAssembly SIMD": {"web/worker.js": no_simd},
        "onnxruntime-web 1.23.2 does not read two-bit weights": {
            "web/vendor/ort.wasm.min.mjs": old
        },
    }
    for message, instead in faults.items():
        monkeypatch.setattr(site, "instead", instead)
        assert show(browser, site, "?threads=1") == "failed", message
        assert message in text_of(browser, "error")
        assert not browser.find_element("id", "send").is_enabled()


def test_a_page_opened_as_a_file_says_that_it_needs_a_server(site, browser):
    browser.get((site.folder / "web" / "index.html").as_uri())
    assert "python -m http.server" in text_of(browser, "error")


def test_every_control_has_a_name_for_screen_readers(site, browser):
    show(browser, site)
    browser.find_element("tag name", "summary").click()
    controls = browser.find_elements("css selector", "textarea, input, button, summary, [role=log]")
    names = [control.accessible_name for control in controls]
    assert len(names) == 10
    assert all(names), names


def test_bench_browser_compares_the_page_with_python(site, browser, monkeypatch, capsys):
    built = site.folder / "web" / "vendor"

    def build(web: Path) -> None:
        shutil.copytree(built, web / "vendor")

    monkeypatch.setattr(browser_lib, "build_page", build)
    assert main(["bench", "browser", "--export", str(site.folder), "--tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Chromium: ready after [\d.]+ s, [\d.]+ tokens/s, peak of the", printed)
    assert "all 8 tokens are the same" in printed
    assert main(["bench", "browser", "--export", str(site.folder), "--tokens", "1"]) == 2
    assert "--tokens is 1: set 2 or more" in capsys.readouterr().err

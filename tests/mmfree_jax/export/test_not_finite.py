"""Exports whose logits are not finite, for one token of the vocabulary: every reader says so."""

import itertools
import json

import numpy as np
import pytest
from onnx_folders import chat, random_export, rewrite
from page_tokenizers import make_tokenizers

from mmfree_jax.errors import CheckpointError
from mmfree_jax.experiments.bench.browser import Site, configure, show, text_of, type_prompt, wait
from mmfree_jax.export import manifest, onnx_session

WORDS = "the model's logits are not finite: its weights are damaged"
SOUND, DAMAGED = "My fellow", "My fellow ü"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, save_model):
    """An export whose embedding of one token, the last of `DAMAGED`, is NaN."""
    folder = tmp_path_factory.mktemp("damaged")
    tokenizer = make_tokenizers()["sentencepiece"]
    export, params = random_export(folder, tokenizer, save_model)
    last = tokenizer.encode(DAMAGED)[-1]
    assert last not in tokenizer.encode(SOUND)
    # Such a model is not exported: the number is put into the file, which is signed again.
    data = export / "model.onnx.data"
    row = np.asarray(params["embedding"]["weight"][last], "<f4").tobytes()
    head, tail = data.read_bytes().split(row)
    data.write_bytes(head + np.full(64, np.nan, "<f4").tobytes() + tail)
    listed = json.loads((export / "export.json").read_text())["files"]
    rewrite(export / "export.json", files=listed | {data.name: manifest.file_entry(data)})
    return export


def test_the_greedy_loop_takes_no_likeliest_of_nan(damaged):
    export, tokenizer = onnx_session.load(damaged, threads=1), make_tokenizers()["sentencepiece"]
    assert len(list(itertools.islice(onnx_session.greedy(export, tokenizer.encode(SOUND)), 2))) == 2
    with pytest.raises(CheckpointError, match=WORDS):
        next(onnx_session.greedy(export, tokenizer.encode(DAMAGED)))


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_the_example_says_so(damaged, temperature):
    options = ("--temperature", temperature, "--max-new-tokens", "2")
    assert chat(damaged, "--prompt", SOUND, *options).returncode == 0
    answer = chat(damaged, "--prompt", DAMAGED, *options)
    assert (answer.returncode, answer.stdout) == (2, DAMAGED)
    assert answer.stderr.startswith(f"chat.py: error: {WORDS}")


@pytest.mark.parametrize(
    "option",
    ["--temperature=nan", "--temperature=-1", "--top-k=-1", "--max-new-tokens=-1", "--seed=-1"],
)
def test_the_example_refuses_a_number_that_cannot_be(damaged, option):
    answer = chat(damaged, "--prompt", SOUND, option)
    name, value = option.split("=")
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"chat.py: error: {name} is {float(value):g}"), answer.stderr


def test_a_temperature_near_zero_draws_the_likeliest(damaged):
    # Few: this model's likeliest tokens are equal now and then, and any of them may be drawn.
    ask = ("--prompt", SOUND, "--max-new-tokens", "12", "--temperature")
    greedy, near = (chat(damaged, *ask, temperature) for temperature in ("0", "1e-320"))
    assert near.returncode == 0
    assert near.stdout == greedy.stdout


@pytest.mark.timeout(180)
def test_the_page_says_so_and_goes_on(damaged, site, browser):
    with Site(damaged, site.folder) as other:
        assert show(browser, other, "?threads=1") == "ready", text_of(browser, "error")
        configure(browser, temperature=0, max_tokens=2)
        type_prompt(browser, DAMAGED)
        wait(browser, "ready")
        assert WORDS in text_of(browser, "error")
        assert browser.find_element("id", "prompt").get_attribute("value") == DAMAGED

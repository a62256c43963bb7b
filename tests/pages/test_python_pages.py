"""The pages for whoever calls the library do what they say, from a text to an answer."""

import re
from importlib import import_module

import numpy as np
import pytest
from run_page import code_of, run_page

SHORTER = {"STEPS = 300": "STEPS = 30", "seq_len=128": "seq_len=32", "size=16": "size=8"}
SHORTER |= {"max_new_tokens=40": "max_new_tokens=4", "window=128": "window=32"}
QUICKER = {"window=128": "window=32", "seq_len=128": "seq_len=32"}
IMPORTED = re.compile(r"^from (mmfree_jax(?:\.\w+)*) import (?:(\w.*)|\(([^)]*)\))$", re.M)
PAGES = [
    "custom-loop.md",
    "evaluating-in-python.md",
    "generating-in-python.md",
    "adding-a-mixer.md",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the page of the loop was followed, and what that gave."""
    folder = tmp_path_factory.mktemp("pages")
    documents = [f"We the people of district {i} say so. " * 8 for i in range(60)]
    (folder / "mine.txt").write_text("\n\n".join(documents))
    return folder, *run_page("custom-loop.md", folder, SHORTER)


def test_the_loop_trains_saves_evaluates_and_generates(trained):
    folder, names, printed = trained
    losses = [float(line.split()[-1]) for line in printed if line.startswith("step ")]
    assert len(losses) == 4
    assert 5.4 < losses[0] < 5.7  # about log 258
    assert losses[-1] < 3.5
    assert abs(names["held_out"].loss.mean - losses[-1]) < 0.5  # it is alike text
    assert names["answer"].finish_reasons == ["length"]
    found = {path.name for path in (folder / "models/mine").iterdir()}
    assert {"model.yaml", "params.safetensors", "tokenizer"} <= found


def test_evaluating(trained, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(trained[0] / "hf"))
    names, printed = run_page("evaluating-in-python.md", trained[0], QUICKER)
    held_out = names["held_out"]
    assert held_out.loss.low < held_out.loss.mean < held_out.loss.high
    assert sum(x.tokens for *_, x in held_out.by_position) == held_out.loss.tokens
    assert f"{held_out.loss.mean:.3f} nats" in printed[0]
    assert names["forgetful"].context == 16
    # The batches' rows begin anew, and so know a little less; but it is the same text.
    assert abs(float(names["loss"] / names["count"]) - held_out.loss.mean) < 0.3
    assert 0 < names["first_count"] < names["count"]
    # A batch of one's own is worth what the scorer says of the same sequences.
    whole = [names["Query"](row, len(row) - 1) for row in names["rows"]]
    expected = [
        -score.log_likelihood / query.scored
        for query, score in zip(whole, names["scorer"].score(whole), strict=True)
    ]
    np.testing.assert_allclose(names["per_text"], expected, rtol=2e-2)
    assert names["best"] == " district"
    assert names["results"]["results"]["district"]["acc,none"] == 1.0


def test_generating(trained):
    names, _ = run_page("generating-in-python.md", trained[0])
    assert "".join(names["pieces"]) == names["streamed"].texts[0] == names["greedy"].texts[0]
    assert len(set(names["answers"].texts)) > 1
    assert names["output"].tokens == names["answers"].tokens
    assert names["word"].tokens[0].count(ord(" ")) <= 1
    whole = names["begun"].tokens[0] + names["ended"].tokens[0]
    assert names["tokenizer"].decode(whole) == names["greedy"].texts[0]
    assert [len(tokens) for tokens in names["three"].tokens] == [5, 5, 5]
    assert len(names["of_answer"]) == len(names["output"].tokens[0])
    # The session's logits are those of the pass over the whole text at its last place.
    last = names["all_TV"][len(names["ids"][0]) - 1]
    np.testing.assert_allclose(names["next_V"], last, atol=0.05)
    np.testing.assert_array_equal(names["again"].logits_BV, names["read"].logits_BV)
    assert names["packed"].tokens[0] == whole


@pytest.mark.parametrize("page", PAGES)
def test_only_public_names_are_imported(page):
    code, files = code_of(page)
    found = IMPORTED.findall("\n".join([code, *files.values()]))
    assert found
    for module, line, lines in found:
        names = {name.strip() for name in (line or lines).split(",")} - {""}
        assert names <= set(import_module(module).__all__), module

"""lm-eval's `local-completions` against the server scores what the offline harness scores."""

import pytest
from served import NAME, small_model

from mmfree_jax.data.tokenizer import ByteTokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from mmfree_jax.evaluate.harness import HarnessModel

PAIRS = [
    ("My fellow citizens,", " we hold these truths"),
    ("My fellow citizens,", " we do not"),
    ("", "A text without a context"),
    ("Ünïcode: 日本", " 語"),
    ("trailing space ", "goes to the answer"),
    ("a" * 150, "b"),
]
UNTIL = [
    ("Once", {"until": ["\n"], "max_gen_toks": 12}),
    ("Two", {"until": ["e"], "max_gen_toks": 9}),
]


def _requests(kind, arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


@pytest.fixture(scope="module")
def offline():
    model, params = small_model()
    return HarnessModel(model, params, ByteTokenizer(), show_progress=False)


@pytest.mark.parametrize("concurrent", [1, 4])
def test_scores_are_those_of_the_offline_harness(small, offline, concurrent):
    remote = LocalCompletionsAPI(
        base_url=f"{small.url}/v1/completions", model=NAME, num_concurrent=concurrent, batch_size=2
    )
    wanted = offline.loglikelihood(_requests("loglikelihood", PAIRS))
    found = remote.loglikelihood(_requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([s for s, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_greedy_continuation_is_scored_as_one(small, offline):
    """Of an answer that the model itself gives."""
    remote = LocalCompletionsAPI(base_url=f"{small.url}/v1/completions", model=NAME)
    text = remote.generate_until(_requests("generate_until", UNTIL[:1]), disable_tqdm=True)[0]
    head = text.partition("\ufffd")[0]
    assert head
    pair = _requests("loglikelihood", [("Once", head)])
    assert remote.loglikelihood(pair, disable_tqdm=True)[0][1] is True
    assert offline.loglikelihood(pair)[0][1] is True


def test_generated_texts_are_those_of_the_offline_harness(small, offline):
    remote = LocalCompletionsAPI(base_url=f"{small.url}/v1/completions", model=NAME)
    requests = _requests("generate_until", UNTIL)
    found = remote.generate_until(requests, disable_tqdm=True)
    assert found == offline.generate_until(_requests("generate_until", UNTIL))

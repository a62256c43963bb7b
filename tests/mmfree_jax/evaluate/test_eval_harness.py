"""lm-eval's requests through the adapter, to an oracle model whose every probability is known."""

import importlib
import itertools

import numpy as np
import pytest

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import ConfigError

pytest.importorskip("lm_eval")

from bigram_oracle import bigram_logits, make_adapter, oracle_params
from lm_eval.api.instance import Instance

from mmfree_jax.evaluate import harness
from mmfree_jax.evaluate.generation_options import generation_options


def _log_p(tokens, table=None):
    """log p of tokens 1, 2, ... given the ones before them."""
    table = bigram_logits() if table is None else table
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    return sum(log_p[a, b] for a, b in itertools.pairwise(tokens))


def _requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def test_log_likelihoods_are_those_of_the_table(adapter):
    pairs = [("abc", "def"), ("a question of some length: x", " y"), ("", "abc"), ("ab ", "c")]
    got = adapter.loglikelihood(_requests("loglikelihood", pairs))
    for (context, continuation), (value, greedy) in zip(pairs, got, strict=True):
        whole = [256 * (not context)] * (not context) + list((context + continuation).encode())
        scored = len(continuation) + (1 if context.endswith(" ") else 0)
        assert value == pytest.approx(_log_p(whole[-scored - 1 :]), abs=1e-4)
        assert greedy == (continuation in ("def", "abc"))


def test_rolling_log_likelihood_predicts_each_token_once(adapter):
    short, long = "abcabc", "the quick brown fox jumps over " * 20
    got = adapter.loglikelihood_rolling(_requests("loglikelihood_rolling", [(short,), (long,)]))
    assert got[0] == pytest.approx(_log_p([256, *short.encode()]), abs=1e-3)
    # In windows: a bigram model sees all that it needs, but for the first token of each.
    assert got[1] == pytest.approx(_log_p([256, *long.encode()]), abs=1e-2)


def test_generate_until(adapter):
    arguments = [
        ("a", {"until": ["f"], "max_gen_toks": 12}),
        ("k", {"until": ["zzz"], "max_gen_toks": 4}),
        ("A text, then: t", {"until": "w", "max_gen_toks": 12}),
    ]
    got = adapter.generate_until(_requests("generate_until", arguments))
    assert got == ["bcde", "lmno", "uv"]


def test_options_of_generated_text_are_read_as_lm_eval_reads_them(adapter):
    asked = {"max_new_tokens": 3, "num_beams": 1, "top_k": 0}
    got = adapter.generate_until(_requests("generate_until", [("a", asked)]))
    assert got == ["bcd"]
    utils = importlib.import_module("lm_eval.models.utils")
    for options in (
        {"temperature": 0.7},
        {"temperature": 0.7, "do_sample": False},
        {"temperature": 0.7, "do_sample": True, "min_p": 0.1, "repetition_penalty": 1.5},
        {"max_tokens": 5, "max_new_tokens": 4, "until": "x"},
        {"max_completion_tokens": 6, "top_p": 0.5},
        {},
    ):
        theirs = utils.normalize_gen_kwargs(options, 256)
        ours = generation_options(options)
        assert ours["max_new_tokens"] == theirs["max_gen_toks"]
        assert ours["stop"] == theirs["until"]
        assert ours["temperature"] == theirs.get("temperature", 0.0)
        for name in ("top_p", "min_p", "repetition_penalty"):
            assert ours.get(name) == theirs.get(name)
    with pytest.warns(UserWarning, match="num_beams = 4, which changes nothing"):
        generation_options({"num_beams": 4})


def test_long_contexts_are_cut_on_the_left():
    adapter = make_adapter(max_length=16)
    (got,) = adapter.loglikelihood(_requests("loglikelihood", [("q" * 100 + "a", "bcd")]))
    assert got[0] == pytest.approx(_log_p(list(b"abcd")), abs=1e-4)
    # Longer than fits: every byte is scored once, a bigram model seeing all that it needs.
    (long,) = adapter.loglikelihood(_requests("loglikelihood", [("a", "bcdefghijklmnopqrs")]))
    assert long == (pytest.approx(_log_p(list(b"abcdefghijklmnopqrs")), abs=1e-3), True)


def _recorded(adapter):
    """The token sequences and counts that the adapter has scored from now on."""
    asked, score = [], adapter.scorer.score

    def record(queries, **options):
        asked.extend((list(q.tokens), q.scored) for q in queries)
        return score(queries, **options)

    adapter.scorer.score = record
    return asked


def test_the_model_reads_exactly_max_length_tokens():
    adapter = make_adapter(max_length=4)
    asked = _recorded(adapter)
    pairs = [("abcdef", "gh"), ("abc", "de"), ("ab", "de"), ("ab", "cdefgh"), ("", "abcde")]
    adapter.loglikelihood(_requests("loglikelihood", pairs))
    adapter.loglikelihood_rolling(_requests("loglikelihood_rolling", [("abcdefg",)]))
    assert asked == [
        (list(b"defgh"), 2),  # four are read, d to g; h is predicted only
        (list(b"abcde"), 2),
        (list(b"abde"), 2),
        (list(b"bcdef"), 4),  # too long for one window: c to f, ...
        (list(b"defgh"), 2),  # ... then g and h
        ([256, *b"abcd"], 4),
        (list(b"abcde"), 1),
        ([256, *b"abcd"], 4),
        (list(b"cdefg"), 3),
    ]
    options = {"max_gen_toks": 1}
    assert adapter._prompt("abcdef", options) == list(b"def")
    assert adapter._prompt("abc", options) == list(b"abc")


def test_a_request_that_cannot_be_scored_loses_no_other(adapter):
    pairs = [("abc", "def"), ("abc", ""), ("", ""), ("  ", "abc"), ("\n", "x"), ("abc", "def")]
    with pytest.warns(UserWarning, match="2 of 6 answers have no tokens .* behind 'abc'"):
        got = adapter.loglikelihood(_requests("loglikelihood", pairs))
    known = (pytest.approx(_log_p(list(b"cdef")), abs=1e-4), True)
    assert got[0] == known
    assert got[5] == known
    assert got[1] == got[2] == (-np.inf, False)
    # A context of white space alone goes to the answer, as a context's trailing spaces do.
    assert got[3][0] == pytest.approx(_log_p([256, *b"  abc"]), abs=1e-4)
    assert got[4][0] == pytest.approx(_log_p([256, *b"\nx"]), abs=1e-4)


class _BosIsZero(ByteTokenizer):
    bos_id, eos_id = 0, 1


class _NoBos(ByteTokenizer):
    bos_id = None


def test_add_bos():
    adapter = make_adapter(add_bos=True)
    assert adapter.tok_encode("ab") == [256, 97, 98]
    assert adapter.tok_encode("ab", add_special_tokens=False) == [97, 98]


def test_add_bos_whose_id_is_zero():
    model, params = oracle_params(bigram_logits())
    adapter = harness.HarnessModel(
        model, params, _BosIsZero(), max_length=16, add_bos=True, show_progress=False
    )
    assert adapter.tok_encode("ab") == [0, 97, 98]
    asked = _recorded(adapter)
    adapter.loglikelihood(_requests("loglikelihood", [("ab", "c"), ("", "c"), (" ", "c")]))
    assert asked == [([0, *b"abc"], 1), ([0, *b"c"], 1), ([0, *b" c"], 2)]


def test_add_bos_without_such_a_token_is_refused():
    model, params = oracle_params(bigram_logits())
    with pytest.raises(ConfigError, match="no start-of-text token"):
        harness.HarnessModel(model, params, _NoBos(), add_bos=True)

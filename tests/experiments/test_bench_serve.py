"""`mmfree bench serve`: a small engine measured, its numbers, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from small_served_model import FOUR, served

from mmfree_jax.cli.main import main
from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.bench import serve, serve_load
from mmfree_jax.experiments.bench.serve_load import Load, Timed
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.requests import Request, RowSampling


def test_every_kind_of_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(plan, model, weights, cache_bytes=1000_000):
        engine = Engine(model, weights, dataclasses.replace(
            FOUR, prefix_cache_bytes=1000_000 if cache_bytes is None else cache_bytes
        ))  # fmt: skip
        engine.start(warm_up=False)
        return engine, {"work": "start"}

    monkeypatch.setattr(serve, "_started", started)
    monkeypatch.setattr(serve, "_model", lambda plan: served())
    monkeypatch.setattr(serve, "_LOOP_STEPS", 2)
    plan = serve.Plan(
        tmp_path / "serve.json", preset="370M", streams=(3,), prompt_tokens=16, new_tokens=20,
        repeats=1, loads=(0.5,), arrivals=4, shared_tokens=16, company=3, http=False,
    )  # fmt: skip
    rows = list(serve.measure(plan, {"command": "c"}))
    record = json.loads((tmp_path / "serve.json").read_text())
    assert record["rows"] == rows
    assert record["device"] == "cpu"
    by_work = {row["work"]: row for row in rows}
    assert list(by_work) == [
        "bare loop", "start", "streams", "arrivals", "company", "prefix cache",
    ]  # fmt: skip
    assert by_work["streams"]["tokens_per_s"] > 0
    assert by_work["streams"]["first_token_p99"] >= by_work["streams"]["first_token_p50"] > 0
    assert by_work["company"]["share_equal"] == 1
    without, cached = rows[-2:]
    assert (without["hits"], without["tokens_saved"]) == (0, 0)
    # 20 prompts that begin alike: the first is read whole.
    assert (cached["hits"], cached["tokens_saved"]) == (19, 19 * 16)


def test_rates_and_delays_are_of_the_right_times() -> None:
    answers = [
        Timed(0.0, ((1.0, 2), (2.0, 2), (3.0, 2)), 6),
        Timed(0.0, ((1.5, 2), (2.5, 2), (3.5, 2)), 6),
    ]
    # All: 12 tokens in 3.5 s. Steady, from 1.5 s to 3 s: three tokens of each.
    assert serve_load.tokens_per_s(answers) == {"whole": 3.4, "steady": 4.0}
    assert serve_load.delays_ms(answers) == {
        "first_token_p50": 1250.0,
        "first_token_p99": 1495.0,
        "a_token_p50": 500.0,
        "a_token_p99": 500.0,
    }
    assert "steady" not in serve_load.tokens_per_s([Timed(0.0, ((1.0, 3),), 3)])


def test_streams_go_through_a_real_server() -> None:
    pytest.importorskip("uvicorn")
    from mmfree_jax.experiments.bench.serve_http import NAME, serve_engine

    running = Engine(*served(), FOUR)
    running.start(warm_up=False)
    requests = tuple(Request((5, 9), 7, RowSampling(0.0), seed=i) for i in range(5))
    with serve_engine(running, None) as url:
        drive = serve_load.through_http(url, NAME)
        at_once, later = drive([Load(requests), Load(requests[:2], rate=50.0)])
        with pytest.raises(MMFreeError, match="bench-not"):
            serve_load.through_http(url, "bench-not")([Load(requests[:1])])
    assert [answer.count for answer in at_once + later] == [7] * 7
    for answer in at_once + later:
        assert sum(count for _, count in answer.came) == pytest.approx(7)
        assert answer.first_s > 0
    assert not running.healthy


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give one of --model FOLDER and --preset NAME"),
        (["--preset", "370M", "--model", "x"], "give one of"),
        (["--preset", "nothing"], "nothing"),
        (["--preset", "370M", "--loads", "0"], "0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--out", str(tmp_path / "r.json"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_file_of_another_kind_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text("mine")
    assert main(["bench", "serve", "--preset", "370M", "--out", str(tmp_path / "r.json")]) == 2
    assert "not replaced" in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == "mine"

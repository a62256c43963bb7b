"""Laws are chosen by what they say of budgets held out."""

import json

import numpy as np
import pytest

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.extrapolate import extrapolate as command
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.extrapolation import extrapolate
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.output_files import write_csv

C = 10 ** np.linspace(17, 21, 9)


def runs(floor, noise=0.001, seed=0):
    """One run a budget, L = floor + 800 C^-0.15: what a floor changes shows at the end."""
    loss = floor + 800 * C**-0.15
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(C)))
    return make_frame(params=np.sqrt(C / 120), tokens=np.sqrt(C * 20 / 6), loss=loss, flops=C)


@pytest.fixture(scope="module")
def scored():
    return extrapolate(runs(1.8), ("line", "power", "power-floor"), resamples=100)


def test_the_law_of_the_runs_wins_and_the_others_err_as_they_must(scored):
    names = [s.fit.law.name for s in scored.scores]
    assert names == ["power-floor", "power", "line"]
    best, power, line = scored.scores
    assert best.weight > 0.9
    assert best.rms < 0.004
    assert power.bias < -0.005  # no floor: too low further on
    assert line.bias < power.bias
    assert sum(s.weight for s in scored.scores) == pytest.approx(1)
    np.testing.assert_allclose(scored.held_out, C[-3:])


def test_errors_are_those_of_a_fit_to_the_cheaper_runs(scored):
    """The straight line is least squares on the loss: by hand with polyfit."""
    line = scored.scores[2]
    x, loss = np.log10(C), runs(1.8).loss
    by_hand = []
    for held in (3, 2, 1):  # the furthest cut first
        fitted = np.polyfit(x[:-held], loss[:-held], 1)
        by_hand += list(np.log(np.polyval(fitted, x[-held:])) - np.log(loss[-held:]))
    assert [f.error for f in line.folds] == pytest.approx(by_hand, rel=1e-8)
    assert [f.fitted for f in line.folds] == [6, 6, 6, 7, 7, 8]
    assert line.rms == pytest.approx(np.sqrt(np.mean(np.square(by_hand))), rel=1e-8)
    np.testing.assert_allclose(line.shortest, np.polyfit(x[:6], loss[:6], 1)[::-1], rtol=1e-8)
    ratio = line.weight / scored.scores[1].weight
    squares = [s.rms**2 + scored.scatter**2 for s in scored.scores]
    assert ratio == pytest.approx((squares[1] / squares[2]) ** 1.5)


def test_the_average_is_of_all_laws_and_its_interval_of_their_refits(scored):
    at = np.array([21.0, 23.0])
    centre, low, high = scored.average(at)
    by_hand = 0.0
    for s in scored.scores:
        p = s.fit.parameters
        c = 10**at
        value = {
            "line": lambda p=p, c=c: p["intercept"] + p["slope"] * np.log10(c),
            "power": lambda p=p, c=c: p["K"] * c ** -p["gamma"],
            "power-floor": lambda p=p, c=c: p["E"] + p["K"] * c ** -p["gamma"],
        }[s.fit.law.name]()
        by_hand = by_hand + s.weight * value
    np.testing.assert_allclose(centre, by_hand, rtol=1e-9)
    truth = 1.8 + 800 * (10**at) ** -0.15
    assert np.all((low < truth) & (truth < high))
    assert high[1] - low[1] > high[0] - low[0]


def test_the_average_counts_the_runs_own_flops_a_token():
    """A head that N leaves out makes small models dearer than 6 N D: C / D = 6 N (1 + 3e3 N^-1/2).

    The least loss at a compute is looked for on a fine grid of sizes at that cost.
    """

    def tokens(n, c):
        return c / (6 * n * (1 + 3e3 / np.sqrt(n)))

    def loss(n, d):
        return 1.8 + 480 * n**-0.35 + 2100 * d**-0.37

    c, n = (a.ravel() for a in np.meshgrid(10 ** np.linspace(17, 20, 7), np.logspace(6, 9, 12)))
    d = tokens(n, c)
    frame = make_frame(params=n, tokens=d, loss=loss(n, d), flops=c)
    result = extrapolate(frame, ("chinchilla",), flops="exact", resamples=0)
    sizes = np.logspace(6, 11, 200_001)
    least = [loss(sizes, tokens(sizes, 10**at)).min() for at in (18.0, 20.0, 21.0)]
    at_six = [loss(sizes, 10**at / 6 / sizes).min() for at in (18.0, 20.0, 21.0)]
    assert least[0] > 1.02 * at_six[0]  # or the cost would not tell
    found = result.average(np.array([18.0, 20.0, 21.0]))[0]
    np.testing.assert_allclose(found, least, rtol=2e-4)


def test_without_a_floor_the_power_law_is_not_outweighed():
    found = extrapolate(runs(0.0), ("power", "power-floor"), resamples=0)
    weight = {s.fit.law.name: s.weight for s in found.scores}
    assert weight["power"] > 0.3
    assert np.isnan(found.average(np.array([21.0]))[1:]).all()


def test_what_cannot_be_scored_is_said():
    found = extrapolate(runs(1.8).take(np.arange(5)), ("line", "broken", "precision"), resamples=0)
    assert "reads the column 'bits' besides" in found.skipped["precision"]
    assert "4 runs below the budgets held out; its 5 parameters" in found.skipped["broken"]
    with pytest.raises(ScalingError, match="3 budgets on the compute frontier"):
        extrapolate(runs(1.8).take(np.arange(3)))
    with pytest.raises(ScalingError, match="no law can be scored: broken: 4 runs"):
        extrapolate(runs(1.8).take(np.arange(5)), ("broken",))


def test_command_writes_scores_beside_the_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = runs(1.8)
    write_csv(tmp_path / "runs.csv", [
        {"params": n, "tokens": d, "loss": loss}
        for n, d, loss in zip(frame.params, frame.tokens, frame.loss, strict=True)
    ])  # fmt: skip
    argv = ["runs.csv", "--laws", "line", "power", "--bootstrap", "30", "--hold-out", "2"]
    assert command([*argv, "--out", "x.json"]) == 0
    assert command([*argv, "--out", "x.json"]) == 0  # its own output may be replaced
    document = json.loads((tmp_path / "x.json").read_text())
    assert list(document["laws"]) == ["power", "line"]
    assert len(document["held_out_budgets"]) == 2
    for law in document["laws"].values():
        assert len(law["held_out"]["predictions"]) == 3
        assert law["n"] == 9
    assert [row["decades_beyond_data"] for row in document["average"]] == [0, 1, 2]
    assert all(row["interval"][0] < row["loss"] < row["interval"][1] for row in document["average"])
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "the 2 largest budgets held out" in capsys.readouterr().out
    with pytest.raises(MMFreeError, match="--hold-out is 0: set a value above 0"):
        command([*argv[:-1], "0"])

"""Joint fits: the optimum of the stated sum, and a test that tells what is shared."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber, logsumexp
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.fit import fit as fit_command
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.joint import by_family, fit_joint
from mmfree_jax.experiments.scaling.joint_law import bind, joint_law, share
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.output_files import write_csv
from mmfree_jax.experiments.scaling.sharing_test import donors

ONE = {"E": 1.75, "A": 420.0, "B": 1900.0, "alpha": 0.34, "beta": 0.36}
TWO = {"E": 1.75, "A": 600.0, "B": 1500.0, "alpha": 0.34, "beta": 0.34}


def family(truth, seed, budgets=4, sizes=6, noise=0.004):
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(18, 20.5, budgets), sizes)
    return draw_runs("chinchilla", truth, params, tokens, noise=noise, seed=seed)


@pytest.fixture(scope="module")
def families():
    return {"ternary": family(ONE, 1), "float": family(TWO, 2, sizes=5)}


@pytest.fixture(scope="module")
def fit(families):
    return fit_joint(families, shared=["E", "alpha"], resamples=100)


def scipy_sum(families, delta=1e-3):
    """Huber's sum and gradient over e, alpha and each family's a, b, beta; none of it ours."""
    n = [np.log(f.params) for f in families.values()]
    d = [np.log(f.tokens) for f in families.values()]
    y = [np.log(f.loss) for f in families.values()]

    def value_and_gradient(theta):
        total, slope = 0.0, np.zeros(8)
        for k in range(2):
            a, b, beta = theta[2 + 3 * k : 5 + 3 * k]
            terms = np.stack([np.full_like(n[k], theta[0]), a - theta[1] * n[k], b - beta * d[k]])
            log_fit = logsumexp(terms, axis=0)
            share_of = np.exp(terms - log_fit)
            r = log_fit - y[k]
            force = np.clip(r, -delta, delta)
            total += huber(delta, r).sum()
            slope[0] += share_of[0] @ force
            slope[1] -= (share_of[1] * n[k]) @ force
            slope[2 + 3 * k : 5 + 3 * k] = (
                share_of[1] @ force, share_of[2] @ force, -(share_of[2] * d[k]) @ force,
            )  # fmt: skip
        return total, slope

    return value_and_gradient


def test_scipy_finds_nothing_lower(families, fit):
    f = scipy_sum(families)
    p = fit.parameters
    found = np.array([
        np.log(p["E"]), p["alpha"],
        *(g(p[f"{q} ({name})"]) for name in ("ternary", "float")
          for q, g in (("A", np.log), ("B", np.log), ("beta", float))),
    ])  # fmt: skip
    assert f(found)[0] == pytest.approx(fit.search.objective, rel=1e-10)
    rng = np.random.default_rng(0)
    spread = np.array([0.05, 0.03, 0.6, 0.6, 0.03, 0.6, 0.6, 0.03])
    lowest = np.inf
    for k in range(24):
        theta = found + rng.standard_normal(8) * spread * (0.2 if k % 2 else 1)
        with np.errstate(all="ignore"):
            for _ in range(3):  # BFGS gives up at kinks: restart it where it stopped
                theta = minimize(f, theta, jac=True, method="BFGS").x
        lowest = min(lowest, f(theta)[0])
    assert fit.search.objective <= lowest * (1 + 1e-10)
    assert lowest <= fit.search.objective * 1.01  # it was a search
    assert np.abs(f(found)[1]).max() < 1e-9


@pytest.mark.parametrize("name", ["chinchilla", "gadre", "broken", "line"])
def test_the_joint_law_is_the_families_laws(name):
    """Values by the formula, derivatives by differences, and every point goes back and forth."""
    law = LAWS[name]
    sharing = share(law, ["a", "b", "c"], [law.parameters[0], law.parameters[-1]])
    n, d, _ = isoflop_design(10.0 ** np.linspace(18, 20, 3), 4)
    x = {"params": n, "tokens": d * np.linspace(1, 3, 12), "compute": 6 * n * d,
         "family": np.repeat([0, 1, 2], [5, 3, 4])}  # fmt: skip
    joint = bind(sharing, x)
    model, size = joint.whole, len(sharing.names)
    truth = {"E": 1.8, "A": 400.0, "B": 1500.0, "alpha": 0.3, "beta": 0.35, "K": 60.0, "a": 300.0,
             "b": 500.0, "eta": 0.2, "c0": 0.1, "c1": 0.05, "C_break": 1e19, "intercept": 9.0,
             "slope": -0.3}  # fmt: skip
    rng = np.random.default_rng(0)
    p = np.array([truth[q.split(" ")[0]] for q in sharing.names])
    p = p * rng.uniform(0.97, 1.03, size)
    z = model.from_parameters(p)
    np.testing.assert_allclose(model.to_parameters(z), p, rtol=1e-9)
    at = model.evaluate(z[None])
    loss = np.exp(at.value[0]) if model.space == "log" else at.value[0]
    by_hand = [
        law.loss(p[sharing.positions(k)], {q: x[q][[i]] for q in law.inputs})[0]
        for i, k in enumerate(x["family"])
    ]
    np.testing.assert_allclose(loss, by_hand, rtol=1e-9)
    np.testing.assert_allclose(joint_law(sharing).loss(p, x), by_hand, rtol=1e-12)
    step = 1e-5 * np.eye(size)
    ahead, behind = model.evaluate(z + step), model.evaluate(z - step)
    np.testing.assert_allclose(at.gradient[0], (ahead.value - behind.value) / 2e-5, atol=1e-8)
    weight = rng.uniform(-1, 1, 12)
    slopes = (ahead.gradient @ weight - behind.gradient @ weight) / 2e-5
    curvature = at.hessian(np.zeros((1, 12)), weight[None])[0]
    np.testing.assert_allclose(curvature, slopes, atol=1e-7)


def test_every_family_has_a_fit_with_the_shared_values(families, fit):
    assert fit.test.p_value > 0.05
    assert fit.sharing.names == (
        "E", "alpha", "A (ternary)", "B (ternary)", "beta (ternary)", "A (float)", "B (float)",
        "beta (float)",
    )  # fmt: skip
    ternary, other = fit.fits["ternary"], fit.fits["float"]
    total = 0.0
    for name, own in fit.fits.items():
        assert own.parameters["E"] == fit.parameters["E"]
        assert own.parameters["alpha"] == fit.parameters["alpha"]
        assert own.parameters["A"] == fit.parameters[f"A ({name})"]
        assert own.intervals["beta"] == fit.intervals[f"beta ({name})"]
        assert own.profiles["E"].interval == fit.profiles["E"].interval
        residual = np.log(own.predict(own.inputs) / families[name].loss)
        part = huber(1e-3, residual).sum()
        assert own.search.objective == pytest.approx(part, rel=1e-9)
        np.testing.assert_allclose(own.vector(), own.model.to_parameters(own.search.point))
        total += part
    assert total == pytest.approx(fit.search.objective, rel=1e-10)
    # Draws of the families belong together: the shared ones are the same, row by row.
    one, two = ternary.bootstrap.parameters, other.bootstrap.parameters
    np.testing.assert_array_equal(one[:, [0, 3]], two[:, [0, 3]])
    assert not np.allclose(one[:, 4], two[:, 4])
    for name, truth in {"E": 1.75, "alpha": 0.34, "beta (ternary)": 0.36}.items():
        low, high = fit.intervals[name]
        assert low - (high - low) < truth < high + (high - low)
        assert low < fit.parameters[name] < high


def floor_runs(floors, seed=0):
    """Families on C alone, L = E + K C^-gamma with gamma 0.15 and noise of 0.3%."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, floor, k in zip(("x", "y"), floors, (800.0, 1000.0), strict=True):
        c = 10 ** np.linspace(16, 20, 14)
        loss = (floor + k * c**-0.15) * np.exp(0.003 * rng.standard_normal(14))
        out[name] = make_frame(params=np.sqrt(c / 120), tokens=np.sqrt(c / 120) * 20, loss=loss)
    return out


def test_sharing_that_holds_is_let_be_and_narrows_the_floor():
    runs = floor_runs((1.8, 1.8))
    found = fit_joint(runs, "power-floor", resamples=100, profile=False, restarts=16)
    assert found.test.freed == 1
    assert found.test.p_value > 0.05
    alone = fit_law(runs["x"], "power-floor", resamples=100, profile=False, holdout=False)
    assert alone.parameters == pytest.approx(found.alone["x"], rel=1e-6)
    assert np.ptp(found.intervals["E"]) < 0.85 * np.ptp(alone.intervals["E"])


def test_another_floor_is_found():
    runs = floor_runs((1.8, 2.15))
    found = fit_joint(runs, "power-floor", resamples=100, profile=False, restarts=16)
    assert found.test.p_value == pytest.approx(1 / 101)
    assert found.test.separate < found.search.objective
    # Where only the floors differ, the exponents may still be one.
    slopes = fit_joint(runs, "power-floor", shared=["gamma"], resamples=100, profile=False,
                       restarts=16)  # fmt: skip
    assert slopes.test.p_value > 0.05
    assert slopes.test.freed == 1


def power_runs(seed, slopes=(0.05, 0.05), n=9, noise=0.01):
    rng = np.random.default_rng(seed)
    out = {}
    for name, slope, level in zip("ab", slopes, (20.0, 25.0), strict=True):
        c = 10 ** np.linspace(17, 20, n)
        loss = level * c**-slope * np.exp(noise * rng.standard_normal(n))
        out[name] = make_frame(params=np.sqrt(c / 120), tokens=np.sqrt(c / 120) * 20, loss=loss)
    return out


@pytest.mark.parametrize(("seed", "slopes"), [(0, (0.05, 0.05)), (1, (0.05, 0.053))])
def test_p_value_is_that_of_the_f_test_where_that_is_exact(seed, slopes):
    """A power law by least squares of logs is linear: two lines against two parallel ones."""
    from scipy.stats import f as f_distribution

    runs = power_runs(seed, slopes)
    found = fit_joint(runs, "power", Objective("log-lsq"), shared=["gamma"], resamples=1000,
                      profile=False, restarts=0)  # fmt: skip
    c = [np.log(6 * r.params * r.tokens) for r in runs.values()]
    y = [np.log(r.loss) for r in runs.values()]
    apart = sum(np.sum((np.polyval(np.polyfit(u, v, 1), u) - v) ** 2)
                for u, v in zip(c, y, strict=True))  # fmt: skip
    du = np.concatenate([u - u.mean() for u in c])
    dv = np.concatenate([v - v.mean() for v in y])
    parallel = np.sum((dv - du * (du @ dv) / (du @ du)) ** 2)
    assert found.test.statistic == pytest.approx(18 * np.log(parallel / apart), rel=1e-8)
    exact = f_distribution.sf((parallel - apart) / (apart / 14), 1, 14)
    assert found.test.p_value == pytest.approx(exact, abs=0.04)


def test_residuals_come_from_runs_of_the_same_family_and_stay_in_order():
    """Two families, 0 to 4 and 5 to 8; rows 0 to 2 are one run, and rows 3 and 4 another."""
    x = {"compute": 10.0 ** np.arange(9), "family": np.repeat([0, 1], [5, 4])}
    joint = bind(share(LAWS["power"], ["a", "b"], ["gamma"]), x)
    clusters = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5])
    drawn = donors(joint, clusters, 200, np.random.default_rng(0))
    assert {tuple(row) for row in drawn[:, :3]} == {(0, 1, 2), (3, 3, 4)}
    assert {tuple(row) for row in drawn[:, 3:5]} == {(0, 1), (3, 4)}
    assert {int(v) for v in drawn[:, 5:].ravel()} == {5, 6, 7, 8}
    assert not np.array_equal(drawn[:, 5], drawn[:, 6])


def test_p_values_are_about_uniform_under_sharing():
    p = np.sort([
        fit_joint(power_runs(seed), "power", shared=["gamma"], resamples=40, profile=False,
                  restarts=0).test.p_value
        for seed in range(24)
    ])  # fmt: skip
    # Kolmogorov and Smirnov's bound at 1% for 24 values is 0.32.
    assert np.abs(p - (np.arange(24) + 0.5) / 24).max() < 0.32


def test_a_file_without_families_is_one_by_its_name():
    named = make_frame(loss=np.ones(3), family=["a", "b", "a"])
    found = by_family([("x", named), ("y", make_frame(loss=np.ones(2)))])
    assert {k: len(v) for k, v in found.items()} == {"a": 2, "b": 1, "y": 2}
    with pytest.raises(ScalingError, match="two files without a family column are called 'y'"):
        by_family([("y", make_frame(loss=np.ones(3))), ("y", make_frame(loss=np.ones(2)))])
    with pytest.raises(ScalingError, match="'family' is empty in 1 of 2 runs"):
        by_family([("x", make_frame(loss=np.ones(2), family=["a", ""]))])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    rows = [
        {"params": float(n), "tokens": float(d), "loss": float(loss), "family": name}
        for name, frame in power_runs(3).items()
        for n, d, loss in zip(frame.params, frame.tokens, frame.loss, strict=True)
    ]
    write_csv(folder / "both.csv", rows)
    write_csv(folder / "few.csv", rows[:11])
    for name in "ab":
        own = [{k: v for k, v in r.items() if k != "family"} for r in rows if r["family"] == name]
        write_csv(folder / f"{name}.csv", own)
    return folder


def test_command_writes_families_that_read_as_single_fits(files, capsys):
    out = files / "joint.json"
    argv = ["--joint", "--law", "power-floor", "--share", "E,gamma", "--bootstrap", "30"]
    assert fit_command([str(files / "both.csv"), *argv, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert list(document)[:5] == ["law", "shared", "objective", "n", "families"]
    assert list(document["shared"]) == ["E", "gamma"]
    assert document["n"] == 18
    for own in document["families"].values():
        assert list(own)[:5] == ["law", "parameters", "objective", "n", "intervals"]
        assert own["parameters"]["gamma"] == document["shared"]["gamma"]["value"]
        assert own["intervals"]["gamma"] == document["shared"]["gamma"]["interval"]
        assert own["n"] == 9
    assert 0 < document["test"]["p_value"] <= 1
    assert document["test"]["parameters_freed"] == 2
    text = capsys.readouterr().out
    assert "E, gamma shared by a, b" in text
    assert f"p = {document['test']['p_value']:.3g} by 30 data sets" in text
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    # Two files without a family column are two families of their names.
    again = files / "again.json"
    quick = [*argv[:-2], "--bootstrap", "0", "--no-plot", "--out", str(again)]
    assert fit_command([str(files / "a.csv"), str(files / "b.csv"), *quick]) == 0
    assert json.loads(again.read_text())["objective"] == document["objective"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.csv", "--joint"], "the runs hold one family ('a'); give runs of two or more"),
        (["both.csv", "--joint", "--share", "gamma"], "'gamma' is no parameter of chinchilla"),
        (["both.csv", "--joint", "--share", "E,"], "'' is no parameter of chinchilla"),
        (["few.csv", "--joint"], "2 runs of family 'b' cannot determine the 5 parameters"),
        (["both.csv", "--joint", "--law", "power"], "power has no floor to share"),
        (["both.csv", "--share", "E"], "needs --joint"),
        (["both.csv", "--joint", "--law", "precision"], "precision reads the column 'bits'"),
        (["both.csv"], "2 families (a, b) in one fit"),
    ],
)
def test_errors_are_one_line(files, monkeypatch, argv, message):
    monkeypatch.chdir(files)
    with pytest.raises(MMFreeError) as caught:
        fit_command(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

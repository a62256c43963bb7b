"""The second study: corpus, configs, losses by document, the cost of a rate, the estimand."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import yaml
import zstandard

from mmfree_jax import load_pretrained
from mmfree_jax.config import DataConfig, EvalConfig, LogConfig, TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.data.dataset import HELDOUT, TRAIN, open_dataset
from mmfree_jax.data.writer import write_dataset
from mmfree_jax.errors import DataError
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.study import check_data, document_losses, gap_slope
from mmfree_jax.experiments.study.corpus import Document, group_of, read, write_corpus
from mmfree_jax.experiments.study.documents import (
    DocumentLosses,
    merged,
    read_losses,
    write_losses,
)
from mmfree_jax.experiments.study.rate_excess import TriedRates, draw_rule, parabola
from mmfree_jax.experiments.study.trunk_noise import trunk_noise
from mmfree_jax.experiments.sweep.branches import with_trunks
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.plan import main_runs, parameters
from mmfree_jax.experiments.sweep.table import COLUMNS
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.training import train


@pytest.mark.parametrize(
    ("source", "text", "name"),
    [
        ("classic-books", "# Title: A\n\n## Year: 1930\n\nText", "classic_books"),
        ("classic-books", "# Title: A\n\n## Year: 1931\n\nText", None),
        ("classic-books-rest", "## Year: 1958\n", None),
        ("gutenberg-text", "No year.\n" + "x" * 3000 + "\n## Year: 1950\n", "gutenberg"),
        ("perseus-latin-translations", "Text", None),
        ("ms-win32", "Text", "manuals"),
    ],
)
def test_which_documents_the_study_has(source, text, name):
    assert group_of(Document(source, "id", text)) == name


def test_a_source_of_no_group_is_an_error():
    with pytest.raises(KeyError):
        group_of(Document("wikipedia", "id", "Text"))


def test_the_corpus_is_written_in_parts_and_in_order(tmp_path):
    lines = [{"id": str(i), "source": "dc-law", "text": f"Section {i} " + "x" * 400}
             for i in range(5)]  # fmt: skip
    lines.insert(2, {"id": "left out", "source": "owasp", "text": "y"})
    lines.insert(0, {"id": "book", "text": "A book."})  # as in classic_books.jsonl.zst
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    counts = write_corpus([tmp_path / "a.jsonl.zst"], tmp_path / "out", 1000, 1)
    assert {name: n for name, n in counts.items() if n} == {
        "classic_books": 1, "law": 5, "left out": 1,
    }  # fmt: skip
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == [
        "classic_books-00.jsonl.zst", "law-00.jsonl.zst", "law-01.jsonl.zst", "law-02.jsonl.zst",
    ]  # fmt: skip
    written = [document.id for f in files[1:] for document in read(f)]
    assert written == ["0", "1", "2", "3", "4"]


def plan(root, tmp_path):
    values = yaml.safe_load((root / "experiments/configs/study2.yaml").read_text())
    rule = {"coefficient": 200.0, "params_exponent": -0.7, "tokens_exponent": 0.0}
    families = [{"family": name, **rule, "params_range": [], "tokens_range": []}
                for name in ("matmulfree", "transformer")]  # fmt: skip
    (tmp_path / "rate_rule.json").write_text(json.dumps({"families": families}))
    for family in values["families"]:
        family["rate_rule"]["file"] = str(tmp_path / "rate_rule.json")
    return from_dict(SweepConfig, values | {"out": str(tmp_path / "out")})


def test_the_plan_has_the_cells_that_the_document_says(pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    sweep = plan(root, tmp_path)
    runs = main_runs(sweep)
    record = json.loads((root / "experiments/results/study2/data.json").read_text())
    unique = sum(splits["train"]["tokens"] for splits in record["sources"].values())
    assert unique == 176_745_977
    assert list(record["sources"]) == [p.rsplit("/")[-1] for p in sweep.train["data"]["paths"]]
    whole = [run for run in runs if not run.family.endswith("-books")]
    assert max(run.tokens for run in whole) < 4 * unique
    assert len(whole) == 169 - 26
    books = record["sources"]["classic_books"]["train"]["tokens"]
    assert max(r.tokens for r in runs if r.family.endswith("-books")) < 4 * books
    # Every size of the path at 20 tokens a parameter, in both families; a trunk for each seed.
    for family in ("matmulfree", "transformer"):
        own = [run for run in runs if run.family == family and run.seed == 0]
        ratios = {run.size: [] for run in own}
        for run in own:
            ratios[run.size].append(run.tokens / parameters(run.config, "non-embedding"))
        at_20 = [size for size, found in ratios.items() if any(abs(r - 20) < 0.2 for r in found)]
        at_80 = [size for size, found in ratios.items() if any(abs(r - 80) < 0.8 for r in found)]
        assert set(at_20) == {"rung-1M", "rung-3M", "rung-7M", "rung-18M", "10x512"}
        assert set(at_80) == {"rung-1M", "rung-3M", "rung-7M"}
    trunks, _ = with_trunks(runs, set())
    assert sum(trunk.family in ("matmulfree", "transformer") for trunk in trunks) == 2 * (9 + 2)


def dataset(folder):
    rng = np.random.default_rng(1)
    documents = [np.r_[0, rng.integers(2, 60, n), 1] for n in (3, 20, 11)]
    identity = {"vocab_size": 64, "sha256": "0" * 64, "kind": "test", "bos_id": 0, "eos_id": 1}
    write_dataset(folder, {"train": documents[:1], "heldout": documents}, identity)
    return documents


def test_data_that_are_not_the_studys_are_named(tmp_path):
    dataset(tmp_path / "law")
    train = open_dataset(tmp_path / "law", TRAIN).fingerprint
    splits = {"train": {"tokens": 5, "fingerprint": train},
              "heldout": {"tokens": 7, "fingerprint": "f" * 64}}  # fmt: skip
    record = tmp_path / "data.json"
    record.write_text(json.dumps({"sources": {"law": splits}}))
    (line,) = check_data.differences(tmp_path, record)
    assert f"{tmp_path}/law, heldout: 40 tokens, fingerprint " in line
    assert "the study has 7, ffffffffffffffff" in line


def test_rows_are_documents_from_their_first_token(tmp_path):
    documents = dataset(tmp_path / "law")
    rows = document_losses.rows_of([open_dataset(tmp_path / "law", HELDOUT)], 8, most=16)
    assert rows.names == ("law/0", "law/1", "law/2")
    assert rows.sources == ("law",) * 3
    assert rows.document.tolist() == [0, 1, 1, 2, 2]
    assert (rows.targets >= 0).sum(1).tolist() == [4, 8, 8, 8, 4]  # 22 tokens are cut after 16
    assert rows.tokens[2].tolist() == documents[1][8:16].tolist()
    assert rows.targets[2].tolist() == documents[1][9:17].tolist()
    assert rows.targets[4].tolist() == [*documents[2][9:], -1, -1, -1, -1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a moment, in a sweep's folder, and the data that it is measured on."""
    root = tmp_path_factory.mktemp("sweep")
    dataset(root / "law")
    config = TrainConfig(
        run_dir=str(root / "runs" / "a"), steps=1, batch_size=8,
        model=ModelConfig(hidden_size=32, num_layers=1, vocab_size=64, compute_dtype="float32",
                          residual_dtype="float32"),
        data=DataConfig(paths=(str(root / "law"),), seq_len=4),
        eval=EvalConfig(batches=0, sample_tokens=0), log=LogConfig(tensorboard=False),
    )  # fmt: skip
    train(config)
    return root


def test_losses_by_document_are_those_of_the_model(trained):
    rows = document_losses.rows_of([open_dataset(trained / "law", HELDOUT)], 8)
    found = document_losses.measure([trained / "runs" / name for name in ("a", "gone")], rows)
    assert found.runs == ("a",)
    assert found.tokens.tolist() == [4, 21, 12]
    model, params = load_pretrained(trained / "runs" / "a")
    tokens, targets = rows.tokens[rows.document == 1], rows.targets[rows.document == 1]
    logits = np.asarray(model.apply({"params": params}, tokens), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    assert found.sums[0, 1] == pytest.approx((log_z - chosen)[targets >= 0].sum(), rel=1e-4)


def losses(seed=0, runs=("a", "b"), documents=40):
    """Two runs whose difference is the same in every document, which themselves differ a lot."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 500, documents)
    of_document = rng.normal(3.0, 0.8, documents)
    sources = tuple("law" if k < 10 else "books" for k in range(documents))
    sums = np.stack([tokens * (of_document + 0.1 * i) for i in range(len(runs))])
    names = tuple(f"{s}/{k}" for k, s in enumerate(sources))
    return DocumentLosses(tuple(runs), names, sources, tokens, sums)


def test_documents_are_drawn_alike_for_all_runs():
    found = losses()
    drawn = found.resampled(500, np.random.default_rng(1))
    assert drawn.shape == (500, 2)
    assert drawn[:, 1] - drawn[:, 0] == pytest.approx(np.full(500, 0.1), abs=1e-9)
    mean = found.means()[0]
    assert drawn[:, 0].mean() == pytest.approx(mean, abs=0.02)
    # Of the standard error of a ratio of sums, whose sources are drawn apart.
    errors = []
    for source in ("law", "books"):
        own = np.array(found.sources) == source
        left = found.sums[0, own] - mean * found.tokens[own]
        errors.append(own.sum() * left.var())
    assert drawn[:, 0].std() == pytest.approx(np.sqrt(sum(errors)) / found.tokens.sum(), rel=0.15)


def test_losses_by_source_and_without_one():
    found = losses()
    law = np.array(found.sources) == "law"
    by_source = found.by_source()
    assert by_source["law"] == pytest.approx(found.sums[:, law].sum(1) / found.tokens[law].sum())
    assert found.of_sources(["law"]).means() == pytest.approx(by_source["books"])


def test_losses_are_kept_and_merged(tmp_path):
    first, second = losses(runs=("a",)), losses(runs=("a", "b"))
    write_losses(tmp_path / "x.npz", first)
    both = merged(read_losses(tmp_path / "x.npz"), second)
    assert both.runs == ("a", "b")
    assert both.sums == pytest.approx(second.sums, rel=1e-6)
    assert both.sources == second.sources
    with pytest.raises(DataError, match="39 documents are not the 40 there"):
        merged(first, losses(documents=39))
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="holds no losses by document"):
        read_losses(tmp_path / "bad.npz")


BEND = 0.08


def cell(params, tokens, best, draws=50, noise=0.0):
    rates = best * np.array([0.3, 0.6, 1.2, 2.4])
    rng = np.random.default_rng(int(params))
    loss = 3 + BEND / 2 * np.log(rates / best) ** 2
    return TriedRates(params, tokens, np.log(rates), loss + noise * rng.standard_normal((draws, 4)))


def test_a_parabola_has_its_lowest_point():
    place, bend = parabola(cell(1e6, 2e7, 4e-3))
    assert np.exp(place) == pytest.approx(np.full(50, 4e-3))
    assert bend == pytest.approx(np.full(50, BEND))
    falling = TriedRates(1e6, 2e7, np.log([1e-3, 2e-3, 4e-3]), np.array([[3.0, 2.9, 2.8]]))
    with pytest.raises(ScalingError, match="at an end of its list"):
        parabola(falling)


def test_the_cost_of_a_rate_follows_from_the_rule():
    def best(params, tokens):
        return 60 * params**-0.5 * tokens**-0.15

    places = [(1e6, 2e7), (1e6, 8e7), (2.7e6, 5e7), (7e6, 1.4e8), (1.8e7, 9e7)]
    rule = draw_rule([cell(n, d, best(n, d)) for n, d in places], np.random.default_rng(0))
    n, d = np.array([4e7, 1e6]), np.array([8e8, 2e7])
    off = np.array([2.0, 1.0])
    found = rule.excess(n, d, off * best(n, d))
    assert found.mean(0) == pytest.approx([BEND / 2 * np.log(2) ** 2, 0.0], abs=1e-6)
    # A rate is no farther from the best one than the lists were wide.
    far = rule.excess(n, d, 1e3 * best(n, d))
    assert far == pytest.approx(np.full((50, 2), BEND / 2 * np.log(4) ** 2))
    scattered = [cell(n, d, best(n, d) * (1.3 if i % 2 else 1 / 1.3))
                 for i, (n, d) in enumerate(places)]  # fmt: skip
    sure, unsure = (draw_rule(c, np.random.default_rng(0)).excess(n, d, best(n, d))
                    for c in ([cell(n, d, best(n, d)) for n, d in places], scattered))  # fmt: skip
    assert unsure.std(0).min() > 10 * sure.std(0).max()
    with pytest.raises(ScalingError, match="3 cells have their best rate inside"):
        draw_rule([cell(n, d, best(n, d)) for n, d in places[:3]], np.random.default_rng(0))


def test_the_noise_of_trunks_and_of_runs_is_told_apart():
    rng = np.random.default_rng(2)
    rows = []
    for size in range(40):
        for seed in range(3):
            shared = 0.004 * rng.standard_normal()
            for tokens in (1, 2, 3, 4):
                log_loss = size / 100 + tokens / 10 + shared + 0.002 * rng.standard_normal()
                trunk = f"{size}-{seed}"
                rows.append({"family": "a", "size": str(size), "seed": str(seed),
                             "tokens": str(tokens), "loss": str(np.exp(log_loss)),
                             "trunk": trunk, "run": f"{trunk}-{tokens}"})  # fmt: skip
    found = trunk_noise(rows)
    assert found.freedom == 80
    assert (found.trunk, found.branch) == pytest.approx((0.004, 0.002), rel=0.2)
    drawn = found.draw(rows[:4] + rows[12:16], 4000, rng)
    assert drawn.std(0) == pytest.approx(np.full(8, np.hypot(found.trunk, found.branch)), rel=0.1)
    related = np.corrcoef(drawn.T)
    assert related[0, 1] == pytest.approx(0.8, abs=0.08)  # branches of one trunk
    assert abs(related[0, 4]) < 0.1
    assert trunk_noise([row for row in rows if row["seed"] == "0"]).freedom == 0


SIZES = {"1M": 1e6, "3M": 2.7e6, "7M": 6.8e6, "18M": 1.8e7, "40M": 4e7}
LAWS = {"matmulfree": (2.0, 180.0, 0.345), "transformer": (2.0, 120.0, 0.32)}


def table(folder, sizes):
    """Rows of both families by known laws, B D^-0.36 in both; FLOPs are 7 N D and 6 N D."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    rows = []
    for family, (floor, a, alpha) in LAWS.items():
        for size in sizes:
            n = SIZES[size]
            for ratio in (5, 20, 80):
                loss = floor + a * n**-alpha + 560 * (ratio * n) ** -0.36
                rows.append(dict.fromkeys(COLUMNS, "") | {
                    "run": f"{family}-{size}-{ratio}", "family": family, "size": size,
                    "params": round(1.2 * n), "params_non_embedding": round(n),
                    "tokens": round(ratio * n),
                    "flops": (7 if family == "matmulfree" else 6) * n * ratio * n, "seed": 0,
                    "learning_rate": 1e-3, "loss": loss + 0.002 * rng.standard_normal(),
                    "trunk": f"{family}-{size}-trunk",
                })  # fmt: skip
    with open(folder / "results.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "results.csv"


def analyse(path, *more):
    given = gap_slope.parser().parse_args(
        ["--tables", str(path), "--resamples", "60", "--restarts", "6", *more]
    )
    return gap_slope.analyse(given)


def test_the_slope_of_known_families_is_found(tmp_path):
    path = table(tmp_path / "a", SIZES)
    whole = analyse(path, "--ratios", "20")
    (at_20,) = whole["paths"]

    def gap(log10_c):  # 20 N tokens cost 140 N^2 and 120 N^2
        losses = []
        for (floor, a, alpha), cost in zip(LAWS.values(), (140, 120), strict=True):
            n = np.sqrt(10.0**log10_c / cost)
            losses.append(floor + a * n**-alpha + 560 * (20 * n) ** -0.36)
        return losses[0] - losses[1]

    low, high = at_20["ends"]
    assert (low, high) == pytest.approx((np.log10(140e12), np.log10(120 * 16e14)))
    true = (gap(high) - gap(low)) / (high - low)
    assert true < -0.03
    assert at_20["slope"] == pytest.approx(true, abs=0.012)
    assert at_20["slope_interval"][0] < true < at_20["slope_interval"][1]
    assert at_20["without_law"]["slope"] == pytest.approx(true, abs=0.012)
    assert "note: beyond the noise the law misses log losses by 0.00" in whole["text"]
    low, high = gap_slope.HELD[20, "slope"]
    assert f"nats a decade (held in {low:.0%} to {high:.0%}): it narrows" in whole["text"]


def test_only_intervals_that_were_tried_say_how_often_they_hold():
    assert gap_slope.held(20.0, "slope").startswith(" (held in ")
    assert gap_slope.held(40.0, "slope") == gap_slope.held(20.5, "slope") == ""


def test_a_table_of_two_sizes_is_analysed_and_of_one_noted(tmp_path):
    found = analyse(table(tmp_path / "two", ["1M", "3M"]), "--ratios", "20", "40")
    assert [path["ratio"] for path in found["paths"]] == [20]
    assert found["paths"][0]["without_law"]["sizes"] == 2
    assert "note: D / N = 40: fewer than two sizes of both families" in found["text"]
    assert "note: matmulfree: the choice of rate is not in the intervals" in found["text"]
    assert "note: held-out documents are not in the intervals" in found["text"]


def test_runs_without_losses_by_document_are_refused(tmp_path):
    path = table(tmp_path / "a", ["1M", "3M"])
    names = [row["run"] for row in csv.DictReader(path.open())]
    write_losses(tmp_path / "d.npz", dataclasses.replace(losses(), runs=tuple(names[:2])))
    with pytest.raises(ScalingError, match="4 runs have no losses by document"):
        analyse(path, "--documents", str(tmp_path / "d.npz"))

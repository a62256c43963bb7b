"""What `measure_model` made, as numbers of which each names the step that it rests on.

A number without command, commit, device and date of its step is refused: it could not be checked.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.errors import DataError
from mmfree_jax.evaluate.report import scores_of
from mmfree_jax.evaluate.tasks import PAPER_TASKS
from mmfree_jax.experiments.study.documents import read_losses
from mmfree_jax.experiments.study.measure_model import OF_A_RUN, RECORD, read_record
from mmfree_jax.experiments.study.model_steps import FORMS
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.packed import open_packed
from mmfree_jax.saved.run_directory import METRICS
from mmfree_jax.text_files import read_json

PROVENANCE = ("command", "commit", "device", "begun", "seconds", "checkpoints")
FLATTERED = ("law", "manuals")
"""Sources whose documents share stock phrases."""
MODELS = "experiments/results/models"
"""Folder of published models, from the root of the repository."""
_RESAMPLES = 2000

Provenance = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Number:
    """A result.

    Attributes:
      name: what it is, "held-out loss/law".
      of: the run that it is of, or "difference": the model's less the twin's.
      value: of it.
      unit: "nats a token" and the like.
      step: that it rests on; several, where it is made of theirs.
      low: lower end of its 95% interval; None: it has none.
      high: upper end.
      rests: what it was counted over, as tokens and documents.
    """

    name: str
    of: str
    value: float
    unit: str
    step: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    rests: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        left_out = {name for name in ("low", "high", "rests") if getattr(self, name) is None}
        return {k: v for k, v in vars(self).items() if k not in left_out} | {
            "step": list(self.step)
        }


def check_provenance(numbers: Sequence[Number], steps: Provenance) -> None:
    """Refuses a number that nobody could check.

    Raises:
      DataError: names the number, the step and what that lacks.
    """
    for number in numbers:
        if not number.step:
            raise DataError(
                f"{number.name} of {number.of} names no step: its provenance is missing"
            )
        for name in number.step:
            where = f"{number.name} of {number.of} rests on the step {name!r}"
            if name not in steps:
                raise DataError(f"{where}, which {RECORD} does not have: measure it again")
            lacks = [key for key in PROVENANCE if steps[name].get(key) in (None, "", {})]
            if lacks:
                raise DataError(f"{where}, whose record lacks {', '.join(lacks)}: measure it again")
            if str(steps[name]["commit"]).endswith("+"):
                raise DataError(
                    f"{where}, which ran on files that differ from commit "
                    f"{steps[name]['commit'][:-1]}: commit them and measure it again"
                )
        if not math.isfinite(number.value):
            raise DataError(f"{number.name} of {number.of} is {number.value}: measure it again")


class Measured:
    """The folder that `measure_model` filled.

    Attributes:
      folder: of it.
      model: name of the model's run.
      twin: name of its twin's.
      steps: provenance of each step that ended well, and of the two trainings.
    """

    def __init__(self, folder: Path, model: str, twin: str) -> None:
        """Reads the record of the steps.

        Raises:
          DataError: there is none, or the model's training has left no record.
        """
        self.folder, self.model, self.twin = folder, model, twin
        record = read_record(folder)
        if not record:
            raise DataError(f"{folder} has no {RECORD}: run measure_model first")
        self.steps: dict[str, dict[str, Any]] = {
            name: step for name, step in record.items() if step.get("code") == 0
        }
        self.failed = sorted(set(record) - set(self.steps))
        for name in (model, twin):
            if (folder / "runs" / name / "summary.json").exists():
                self.steps[f"train {name}"] = self._training(name)
        if f"train {model}" not in self.steps:
            raise DataError(f"{folder} has no runs/{model}: {', '.join(OF_A_RUN)} of its training")

    def summary(self, name: str) -> dict[str, Any]:
        """What a run says of itself at its end."""
        return read_json(self.folder / "runs" / name / "summary.json")

    def _training(self, name: str) -> dict[str, Any]:
        """Provenance of a training, whose device is the one on which it was then measured.

        The command is that of the resolved config, which is published beside the model.
        """
        summary = self.summary(name)
        records = read_history(self.folder / "runs" / name / METRICS)
        times = [r["unix_time"] for r in records if "unix_time" in r]
        after = next((s for s in self.steps.values() if name in s.get("checkpoints", {})), {})
        begun = np.datetime_as_string(np.datetime64(int(min(times)), "s")) if times else None
        return {
            "command": training_command(self.model, name),
            "commit": after.get("commit"),
            "device": after.get("device"),
            "device_kind": summary["device"]["kind"],
            "begun": None if begun is None else f"{begun}+00:00",
            "seconds": round(float(summary["seconds"]), 1),
            "checkpoints": after.get("checkpoints"),
            "versions": summary["versions"],
        }

    def sources(self) -> list[str]:
        """Sources whose losses of the model were measured, in the order of training."""
        names = [Path(path).name for path in self.summary(self.model)["data"]["paths"]]
        return [name for name in names if f"held-out {self.model} {name}" in self.steps]

    def held_out(self, name: str, source: str) -> dict[str, Any] | None:
        """A run's losses on a source; None where they were not measured."""
        if f"held-out {name} {source}" not in self.steps:
            return None
        return read_json(self.folder / "held-out" / name / source / name / "held_out.json")


def training_command(model: str, name: str) -> str:
    """The command that trains a run as it was, from the root of the repository.

    Args:
      model: the published one, in whose folder the config lies.
      name: of the run: its own, or its twin's.
    """
    return f"mmfree train --config {MODELS}/{model}/{training_file(name)} --run-dir runs/{name}"


def training_file(name: str) -> str:
    """Name of the published config of a run: `config.yaml` would mark the folder as the run."""
    return f"training-{name}.yaml"


def numbers_of(measured: Measured) -> list[Number]:
    """All that was measured.

    Raises:
      DataError: provenance is missing, or a file is not what its step makes.
    """
    found = [
        *_training(measured),
        *_held_out(measured),
        *_differences(measured),
        *_packing(measured),
        *_agreement(measured),
        *_needle(measured),
        *_tasks(measured),
    ]
    check_provenance(found, measured.steps)
    return found


def _training(m: Measured) -> Iterator[Number]:
    for name in (m.model, m.twin):
        step = f"train {name}"
        if step not in m.steps:
            continue
        summary = m.summary(name)
        yield Number("training/steps", name, summary["step"], "steps", (step,))
        yield Number("training/tokens", name, summary["tokens"], "tokens", (step,))
        yield Number("training/FLOPs", name, summary["training_flops"], "FLOPs", (step,))
        yield Number("training/best step", name, summary["best"]["step"], "steps", (step,))
        passes = summary["tokens"] / sum(summary["data"]["tokens"])
        yield Number("training/passes", name, passes, "passes over the training text", (step,))
        held_out = summary["best"]["value"]
        yield Number("training/best held-out loss", name, held_out, "nats a token", (step,))
        for part, count in summary["parameters"].items():
            yield Number(f"parameters/{part}", name, count, "parameters", (step,))


def _held_out(m: Measured) -> Iterator[Number]:
    for name in (m.model, m.twin):
        tables = {source: m.held_out(name, source) for source in m.sources()}
        tables = {source: table for source, table in tables.items() if table is not None}
        for source, table in tables.items():
            step, loss = (f"held-out {name} {source}",), table["loss"]
            rests = {"tokens": loss["tokens"], "documents": loss["documents"]}
            yield _interval(f"held-out loss/{source}", name, loss, "nats a token", step, rests)
            bits = loss["bits_per_byte"]
            yield _interval(f"bits a byte/{source}", name, bits, "bits a byte", step, rests)
            for place in table["by_position"]:
                where = f"loss by position/{source}/{_span(place['from'], place['to'])}"
                rests = {"tokens": place["tokens"], "documents": place["documents"]}
                yield _interval(where, name, place, "nats a token", step, rests)
        if tables:
            yield from _together(name, tables, "all sources")
        books = {s: t for s, t in tables.items() if s not in FLATTERED}
        if books and len(books) < len(tables):
            yield from _together(name, books, "without " + " and ".join(FLATTERED))


def _span(first: int, end: int | None) -> str:
    return f"{first} to {end - 1}" if end is not None else f"{first} and later"


def _interval(
    name: str, of: str, values: Mapping[str, Any], unit: str, step: tuple[str, ...], rests: Any
) -> Number:
    return Number(name, of, values["mean"], unit, step, values["low"], values["high"], rests)


def _together(of: str, tables: Mapping[str, Mapping[str, Any]], what: str) -> Iterator[Number]:
    """Means over the tokens of several sources.

    Their documents are drawn independently, so that the variances of the sources' means add;
    half of each interval stands for 1.96 standard errors.
    """
    step = tuple(f"held-out {of} {source}" for source in tables)
    losses = [table["loss"] for table in tables.values()]
    yield _weighted(f"held-out loss/{what}", of, losses, "nats a token", step)
    nats = sum(x["mean"] * x["tokens"] for x in losses)
    size = sum(t["loss"]["tokens"] * t["bytes_per_token"] for t in tables.values())
    yield Number(f"bits a byte/{what}", of, nats / math.log(2) / size, "bits a byte", step)
    places: dict[str, list[Mapping[str, Any]]] = {}
    for table in tables.values():
        for place in table["by_position"]:
            places.setdefault(_span(place["from"], place["to"]), []).append(place)
    for span in sorted(places, key=lambda s: int(s.split()[0])):
        where = f"loss by position/{what}/{span}"
        yield _weighted(where, of, places[span], "nats a token", step)


def _weighted(
    name: str, of: str, parts: Sequence[Mapping[str, Any]], unit: str, step: tuple[str, ...]
) -> Number:
    tokens = np.array([x["tokens"] for x in parts], float)
    share = tokens / tokens.sum()
    mean = float(share @ np.array([x["mean"] for x in parts]))
    low = high = None
    if all(x["low"] is not None for x in parts):
        half = np.array([(x["high"] - x["low"]) / 2 for x in parts])
        error = float(np.sqrt(np.sum((share * half) ** 2)))
        low, high = mean - error, mean + error
    rests = {"tokens": int(tokens.sum()), "documents": sum(x["documents"] for x in parts)}
    return Number(name, of, mean, unit, step, low, high, rests)


def _differences(m: Measured) -> Iterator[Number]:
    """The model's losses less the twin's on the same documents, resampled together."""
    if "documents" not in m.steps:
        return
    losses = read_losses(m.folder / "documents.npz")
    if not {m.model, m.twin} <= set(losses.runs):
        return
    pair = [losses.runs.index(m.model), losses.runs.index(m.twin)]
    names = tuple(dict.fromkeys(losses.sources))
    parts = {name: set(names) - {name} for name in names}
    parts |= {"all sources": set(), "without " + " and ".join(FLATTERED): set(FLATTERED)}
    for what, left_out in parts.items():
        own = losses.of_sources(left_out)
        if not own.documents:
            continue
        means = own.means()[pair]
        draws = own.resampled(_RESAMPLES, np.random.default_rng(0))[:, pair]
        low, high = np.percentile(draws[:, 0] - draws[:, 1], [2.5, 97.5])
        has_interval = len(own.documents) > 1
        rests = {"tokens": int(own.tokens.sum()), "documents": len(own.documents)}
        yield Number(
            f"held-out loss/{what}", "difference", float(means[0] - means[1]), "nats a token",
            ("documents",), float(low) if has_interval else None,
            float(high) if has_interval else None, rests,
        )  # fmt: skip


def _packing(m: Measured) -> Iterator[Number]:
    if "pack" not in m.steps:
        return
    agreement = open_packed(m.folder / "packed").agreement
    if agreement is not None:
        rests = {"prompts": len(agreement.agreed), "tokens": agreement.new_tokens}
        kept = float(agreement.kept)
        yield Number("packed/streams kept", m.model, kept, "of the prompts", ("pack",), rests=rests)


def _agreement(m: Measured) -> Iterator[Number]:
    for form in FORMS:
        step = (f"agreement {form}",)
        if step[0] not in m.steps:
            continue
        record = read_json(m.folder / "agreement" / f"{form}.json")
        rests = {"tokens": record["tokens"]}
        for key, unit in (
            ("kl_nats", "nats"), ("same_top_1", "share"), ("perplexity", "perplexity"),
            ("perplexity_of_float32", "perplexity"), ("largest_difference", "logits"),
        ):  # fmt: skip
            yield Number(f"agreement/{form}/{key}", m.model, record[key], unit, step, rests=rests)
        rests = {"prompts": record["prompts"], "tokens": record["new_tokens"]}
        for reference in ("float32", "trained"):
            streams = record[f"streams_of_{reference}"]
            for key, value in (
                ("kept", streams["kept"]), ("median agreed", np.median(streams["agreed_tokens"])),
            ):  # fmt: skip
                name = f"agreement/{form}/streams of {reference}/{key}"
                unit = "of the prompts" if key == "kept" else "tokens"
                yield Number(name, m.model, float(value), unit, step, rests=rests)


def _needle(m: Measured) -> Iterator[Number]:
    for name in (m.model, m.twin):
        step = (f"needle {name}",)
        if step[0] not in m.steps:
            continue
        record = read_json(m.folder / "needle" / name / name / "needle.json")
        for cell in record["cells"]:
            depth = "no fact" if cell["depth"] is None else f"depth {cell['depth']:g}"
            for kind in ("chosen", "written"):
                share = cell[kind]
                yield Number(
                    f"needle/{cell['length']} tokens/{depth}/{kind}", name,
                    share["share"], "share", step, share["low"], share["high"],
                    {"asked": share["asked"]},
                )  # fmt: skip


def _tasks(m: Measured) -> Iterator[Number]:
    for name in (m.model, m.twin):
        step = (f"tasks {name}",)
        if step[0] not in m.steps:
            continue
        (file,) = sorted((m.folder / "tasks" / name / name).glob("results_*.json"))
        results = read_json(file)
        for task in PAPER_TASKS:
            count = results.get("n-samples", {}).get(task, {}).get("effective")
            for metric in ("acc", "acc_norm"):
                if (score := scores_of(results, task, metric)) is None:
                    continue
                value, error = score
                half = 1.96 * error if math.isfinite(error) else None
                yield Number(
                    f"tasks/{task}/{metric}", name, value, "percent", step,
                    None if half is None else value - half,
                    None if half is None else value + half,
                    None if count is None else {"documents": count},
                )  # fmt: skip

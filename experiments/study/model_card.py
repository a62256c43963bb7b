"""The README.md of a published model: every figure in it is one of `model_results`."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfree_jax.evaluate.tasks import PAPER_TASKS
from mmfree_jax.experiments.study.corpus import GROUPS
from mmfree_jax.experiments.study.model_results import (
    FLATTERED,
    MODELS,
    Number,
    training_command,
)
from mmfree_jax.experiments.study.model_steps import FORMS, SAMPLING, WINDOW
from mmfree_jax.experiments.study.text_sources import SOURCES

Table = list[Sequence[str]]


class Card:
    """Writes a model's README.md.

    A figure that was not measured leaves "-", and a part of which none was says so.
    """

    def __init__(
        self,
        model: str,
        twin: str,
        numbers: Sequence[Number],
        steps: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        """Takes what there is to say.

        Args:
          model: name of the model, and of its run.
          twin: of its twin's.
          numbers: all that was measured.
          steps: provenance of each step.
          config: the resolved config of the training.
          samples: answers, as `mmfree generate --json` prints them, in order.
        """
        self._model, self._twin, self._steps = model, twin, steps
        self._numbers = {(number.name, number.of): number for number in numbers}
        self._config, self._samples = config, samples

    def text(self) -> str:
        """The whole card."""
        parts = (
            self._head(), self._training(), self._losses(), self._positions(), self._tasks(),
            self._needle(), self._agreement(), self._written(), self._data(), self._limits(),
            self._measuring(),
        )  # fmt: skip
        return "\n\n".join(part for part in parts if part) + "\n"

    def _get(self, name: str, of: str | None = None) -> Number | None:
        return self._numbers.get((name, of or self._model))

    def _show(self, name: str, of: str | None = None, form: str = ".3f", factor: float = 1) -> str:
        number = self._get(name, of)
        if number is None:
            return "-"
        value = f"{factor * number.value:{form}}"
        if number.low is None or number.high is None:
            return value
        return f"{value} ({factor * number.low:{form}} to {factor * number.high:{form}})"

    def _elsewhere(self, *names: str) -> str:
        """The devices of those steps that ran on another than the training; "" where none did."""
        own = self._steps[f"train {self._model}"]["device"]
        devices = (self._steps[name]["device"] for name in names if name in self._steps)
        return ", ".join(dict.fromkeys(device for device in devices if device != own))

    def _afterwards(self, step: str) -> str:
        if not (device := self._elsewhere(step)):
            return ""
        return f" Of the MatMul-free model the packed files were read, on {device}."

    def _head(self) -> str:
        ternary, total = (
            self._show(f"parameters/{part}", form=",.0f") for part in ("ternary", "total")
        )
        return f"""# {self._model}

A MatMul-free language model of {ternary} ternary weights ({total} parameters with the embedding), trained on English text alone, without instructions; to try the software with. Packed at 1.6 bits a weight, embedding in bfloat16.

```bash
mmfree generate --model {MODELS}/{self._model} --prompt "It was"
```

Written by `python -m mmfree_jax.experiments.study.publish_model`; every figure is in `results.json` with the command, commit, device, date and seconds of its step. Intervals are 95%. "Transformer++" is the twin: the same data, order, steps, tokenizer, depth and width, one seed of each; its weights are not published."""  # noqa: E501

    def _training(self) -> str:
        rows: Table = [("", "MatMul-free", "Transformer++")]
        for label, name, form in (
            ("parameters without embedding and head", "parameters/non_embedding", ",.0f"),
            ("steps", "training/steps", ",.0f"),
            ("tokens", "training/tokens", ",.0f"),
            ("passes over the text", "training/passes", ".1f"),
            ("FLOPs, as counted by this project", "training/FLOPs", ".3g"),
            ("checkpoint that was kept (best held-out loss)", "training/best step", ",.0f"),
            ("its held-out loss on the way, nats", "training/best held-out loss", ".4f"),
        ):
            rows.append((label, *(self._show(name, of, form) for of in (self._model, self._twin))))
        step = self._steps[f"train {self._model}"]
        shape = (
            f"{self._config['batch_size']} rows of {self._config['data']['seq_len']} tokens, seed "
            f"{self._config['seed']} of the weights and {self._config['data']['seed']} of the order"
        )
        versions = ", ".join(
            f"{k} {v}" for k, v in step["versions"].items() if k in ("jax", "flax")
        )
        return f"""## Training

{_table(rows)}

{shape}, documents masked; begun {step["begun"]}, {step["seconds"]:,.0f} s of it the model's, on {step["device"]} with {versions}, commit `{step["commit"]}`:

```bash
{training_command(self._model, self._model)}
{training_command(self._model, self._twin)}
```

The two configs lie beside this file; paths of data are those of the study, prepared as docs/scaling-study-plan.md says (`experiments/results/study2/data.json` has their fingerprints)."""  # noqa: E501

    def _sources(self) -> list[str]:
        there = [name for name in GROUPS if self._get(f"held-out loss/{name}")]
        return [*there, "all sources", "without " + " and ".join(FLATTERED)]

    def _losses(self) -> str:
        rows: Table = [
            ("held-out text", "MatMul-free, nats a token", "Transformer++",
             "difference, same documents", "MatMul-free, bits a byte", "Transformer++"),
        ]  # fmt: skip
        for source in self._sources():
            losses = (
                self._show(f"held-out loss/{source}", of)
                for of in (self._model, self._twin, "difference")
            )
            bits = (
                self._show(f"bits a byte/{source}", of, "z.3f") for of in (self._model, self._twin)
            )
            rows.append((source, *losses, *bits))
        return f"""## Held-out loss by source

{_table(rows)}

Every token of documents kept back from training; intervals from a bootstrap over documents, of sources together from the sources' own. The model carries its state through a document, the twin reads windows of {WINDOW} tokens afresh. The differences are of both in windows of {WINDOW} tokens, at most 32,768 tokens of a document, the same documents drawn for both, so that they are not those of the columns before. `law` and `manuals` repeat stock phrases, which flatters there."""  # noqa: E501

    def _positions(self) -> str:
        prefix = "loss by position/all sources/"
        spans = [name.removeprefix(prefix) for name, of in self._numbers
                 if name.startswith(prefix) and of == self._model]  # fmt: skip
        rows: Table = [("tokens before", "MatMul-free", "Transformer++", "documents")]
        for span in spans:
            number = self._get(prefix + span)
            assert number is not None
            documents = f"{(number.rests or {}).get('documents', 0):,}"
            pair = (self._show(prefix + span, of) for of in (self._model, self._twin))
            rows.append((span, *pair, documents))
        return f"""## Loss by position in the document

{_table(rows)}

Nats a token over all sources; late positions are of long books alone."""

    def _tasks(self) -> str:
        rows: Table = [("accuracy, %", "chance", "MatMul-free", "Transformer++", "documents")]
        for task, info in PAPER_TASKS.items():
            for metric in ("acc", "acc_norm"):
                name = f"tasks/{task}/{metric}"
                if (number := self._get(name)) is None:
                    continue
                count = (number.rests or {}).get("documents")
                rows.append((
                    f"{task}, {metric}", f"{100 * info.chance:.0f}",
                    *(self._show(name, of, ".1f") for of in (self._model, self._twin)),
                    "-" if count is None else f"{count:,.0f}",
                ))  # fmt: skip
        if len(rows) == 1:
            return "## The paper's six tasks\n\nNot measured."
        return f"""## The paper's six tasks

{_table(rows)}

Zero examples, lm-eval's definitions; 1.96 standard errors. Where the interval holds chance, nothing shows that the model can do the task. The tasks' own texts are not in this repository; whether parts of them occur in the training text was not looked into.{self._afterwards(f"tasks {self._model}")}"""  # noqa: E501

    def _needle(self) -> str:
        names = [
            name.rpartition("/")[0] for name, of in self._numbers
            if name.startswith("needle/") and name.endswith("/chosen") and of == self._model
        ]  # fmt: skip
        if not names:
            return "## A fact in a text\n\nNot measured."
        rows: Table = [("text, place of the fact", "chosen of ten: MatMul-free", "Transformer++",
                        "written: MatMul-free", "Transformer++")]  # fmt: skip
        for name in names:
            cells = (
                self._show(f"{name}/{kind}", of, ".0f", 100)
                for kind in ("chosen", "written")
                for of in (self._model, self._twin)
            )
            rows.append((name.removeprefix("needle/").replace("/", ", "), *cells))
        return f"""## A fact in a text

{_table(rows)}

Percent of questions answered (`mmfree eval needle`). "chosen": the right one of ten answers is the likeliest; "written": greedy text begins with it. "no fact": the same question without it, so that nothing was read; ten answers are 10% by chance.{self._afterwards(f"needle {self._model}")}"""  # noqa: E501

    def _agreement(self) -> str:
        rows: Table = [("program", "streams of float32 kept", "streams of the trained dtypes kept",
                        "KL, nats", "same likeliest token, %", "perplexity")]  # fmt: skip
        for form in FORMS:
            name = f"agreement/{form}"
            kept = self._get(f"{name}/streams of float32/kept")
            if kept is None:
                continue
            prompts = (kept.rests or {})["prompts"]
            mark = " (*)" if self._elsewhere(f"agreement {form}") else ""
            rows.append((
                form + mark,
                *(f"{self._show(f'{name}/streams of {of}/kept', form='.0f')} of {prompts:.0f}"
                  for of in ("float32", "trained")),
                self._show(f"{name}/kl_nats", form=".1e"),
                self._show(f"{name}/same_top_1", form=".2f", factor=100),
                self._show(f"{name}/perplexity_of_float32", form=".3f") + " -> "
                + self._show(f"{name}/perplexity", form=".3f"),
            ))  # fmt: skip
        if len(rows) == 1:
            return "## Agreement of programs\n\nNot measured."
        packing = self._get("packed/streams kept")
        said = ""
        if packing is not None:
            prompts = (packing.rests or {})["prompts"]
            said = (
                f" `mmfree pack` itself found {packing.value:.0f} of {prompts:.0f} streams kept "
                "where it packed."
            )
        device = self._elsewhere(*(f"agreement {form}" for form in FORMS))
        if device:
            said += (
                f" (*): on {device}, and compared with the packed files, in float32 and in the "
                "dtypes of training."
            )
        return f"""## Agreement of programs

{_table(rows)}

Each is compared with the trained model in float32 by XLA, on the machine that trained it: greedy streams of 200 tokens behind stretches of held-out text, and the predictions of each token of others. `trained` and `packed` compute in the dtypes of training; the others in float32, packed and ONNX with the embedding as it is stored, in bfloat16 (fast: int8). A greedy text parts for good at the first token that is decided by little, so that few kept texts beside equal perplexities are what correct programs of other roundings give (docs/inference.md, docs/edge.md, docs/interop.md).{said}"""  # noqa: E501

    def _written(self) -> str:
        if not self._samples:
            return "## Samples\n\nNot made."
        shown = []
        for sample in self._samples:
            prompt, text = str(sample["prompt"]), str(sample["text"])
            label = f"Behind {prompt!r}" if prompt else "From nothing"
            label += f", seed {sample['seed']}:"
            quoted = "\n".join(f"> {line}".rstrip() for line in (prompt + text).split("\n"))
            shown.append(f"{label}\n\n{quoted}")
        options = " ".join(SAMPLING)
        return (
            f"## Samples\n\nAll that were drawn, one a prompt, none chosen (`{options}`).\n\n"
            + "\n\n".join(shown)
        )

    def _data(self) -> str:
        kept = {source for sources in GROUPS.values() for source in sources}
        groups = {source: name for name, sources in GROUPS.items() for source in sources}
        rows: Table = [("source", "held-out as", "from (GitHub)", "licence", "where it says so")]
        for source in SOURCES:
            if source.name in kept:
                rows.append((source.name, groups[source.name], source.origin, source.licence,
                             source.stated))  # fmt: skip
        return f"""## Data, licences, attribution

{_table(rows)}

The text was changed: cleaned, cut and joined. Left out: sources under CC BY-SA, and books whose heading gives a year after 1930. "Public domain" means in the USA; three sources have no licence file of their own, as the table says. E-mail addresses and phone numbers were replaced; names and postal addresses were not. The weights and tokenizer are given under this project's licence (Apache-2.0) as far as it may do so; the texts keep theirs, and sources under CC BY, MIT and Apache are credited by this table."""  # noqa: E501

    def _limits(self) -> str:
        return """## Limits

It continues text; it follows no instructions and knows no conversation. What it states is not to be relied on: it is far too small, and saw far too little. Most tokens it read are of books from before 1930, most documents are web pages, abstracts, laws and manuals; it writes as they do, prejudices included, and nothing was done to filter or to align it. English alone. It was trained on rows of 512 tokens: what it carries further is in the table by position. One seed: differences from the twin as small as those between seeds (docs/scaling-study-plan.md) say nothing. It has not been tested for any use."""  # noqa: E501

    def _measuring(self) -> str:
        rows: Table = [("step", "command", "begun", "seconds", "device", "commit")]
        for name, step in self._steps.items():
            rows.append((name, f"`{step['command']}`", step["begun"], f"{step['seconds']:,.0f}",
                         step["device"], f"`{step['commit'][:12]}`"))  # fmt: skip
        return f"""## Steps

Several ran beside each other, so that their seconds are no measure of speed.

{_table(rows)}"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |"
                     for row in lines)  # fmt: skip

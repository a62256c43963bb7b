"""What is measured of the model for users and of its twin: one table of commands.

All of them run in one folder, that of a hold of a machine, which has `runs/NAME`; what they make
lies in `after/` there (docs/scaling-study-plan.md). `measure_model` runs them, `model_results`
reads what they made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MMFREE = "mmfree_jax"
STUDY = "mmfree_jax.experiments.study"
PROMPTS = (
    "",
    "It was",
    "The President of the United States",
    "Once upon a time there was",
    "The court held that",
    "We propose a method for",
    "To install the module, open a terminal and",
    "Chapter I.\n\n",
)
"""What is continued, each by the seed of its place from 1 on; the first begins a document."""
FORMS = ("trained", "packed", "packed-float32", "onnx-exact", "onnx-fast", "transformers")
"""Programs that are compared with the trained model in float32; see `model_agreement`."""
SAMPLING = ("--temperature", "0.8", "--top-p", "0.95", "--max-new-tokens", "150")
WINDOW = 512


@dataclass(frozen=True)
class Step:
    """A command that makes one file, or one folder.

    Attributes:
      name: of its record and of its log.
      module: run by `python -m`.
      arguments: behind it.
      makes: below the folder of results; it is deleted before the command runs.
      seconds: after which the command is ended.
      runs: folders of the runs that it reads.
      needs: other files and folders that must be there.
      prints: what it prints is the file that it makes.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    makes: str
    seconds: int
    runs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    prints: bool = False

    @property
    def command(self) -> str:
        """As one would write it."""
        program = "mmfree" if self.module == MMFREE else f"python -m {self.module}"
        quoted = (f"'{a}'" if not a or " " in a else a for a in self.arguments)
        return " ".join((program, *quoted))


def steps(
    run: str,
    twin: str,
    sources: Sequence[str],
    *,
    data: Path,
    out: Path,
    tasks: Path,
    task_limit: int | None = None,
    documents: int = 15,
) -> list[Step]:
    """The steps in the order in which they are begun.

    Args:
      run: folder of the model's run.
      twin: of its Transformer++ twin.
      sources: names of the prepared data sets below `data`.
      data: folder of them.
      out: folder of the results.
      tasks: folder of the paper's six tasks.
      task_limit: documents of each task; None: all.
      documents: held-out documents of the first source, which begin the prompts of `pack`.
    """
    first = str(data / sources[0])
    packed = str(out / "packed")
    found = [
        Step(
            "pack",
            MMFREE,
            (
                "pack", "--model", run, "--step", "best", "--bits", "1.6",
                "--embedding", "bfloat16", "--max-file-mb", "16", "--agreement-tokens", "200",
                "--agreement-prompts", str(documents), "--agreement-data", first, "--out", packed,
            ),
            "packed", 150, (run,),
        )
    ]  # fmt: skip
    # The longest come early, so that others run beside them.
    for model in (run, twin):
        name = Path(model).name
        limit = () if task_limit is None else ("--limit", str(task_limit))
        found.append(
            Step(
                f"tasks {name}",
                MMFREE,
                ("eval", "--model", model, "--step", "best", "--tasks", "paper",
                 "--tasks-dir", str(tasks), "--output", str(out / "tasks" / name),
                 "--no-progress", *limit),
                f"tasks/{name}", 400, (model,), (str(tasks),),
            )
        )  # fmt: skip
    found += [_held_out(model, source, data, out) for model in (run, twin) for source in sources]
    found.append(
        Step(
            "documents",
            f"{STUDY}.document_losses",
            (
                "--runs", run, twin, "--step", "best", "--length", str(WINDOW),
                "--data", *(str(data / source) for source in sources),
                "--out", str(out / "documents.npz"),
            ),
            "documents.npz", 150, (run, twin),
        )
    )  # fmt: skip
    found.append(
        Step(
            "samples",
            MMFREE,
            ("generate", "--model", packed, "--prompts-file", str(out / "prompts.jsonl"),
             *SAMPLING, "--json", "--quiet"),
            "samples.jsonl", 90, (run,), (packed,), prints=True,
        )
    )  # fmt: skip
    found += [
        Step(
            f"agreement {form}",
            f"{STUDY}.model_agreement",
            (
                "--run", run, "--step", "best", "--packed", packed, "--form", form,
                "--data", first, "--scratch", str(out / "scratch"),
                "--out", str(out / "agreement" / f"{form}.json"),
            ),
            f"agreement/{form}.json", 240, (run,), (packed,),
        )
        for form in FORMS
    ]  # fmt: skip
    for model in (run, twin):
        name = Path(model).name
        found.append(
            Step(
                f"needle {name}",
                MMFREE,
                ("eval", "needle", "--model", model, "--step", "best", "--data", first,
                 "--output", str(out / "needle" / name), "--no-progress"),
                f"needle/{name}", 300, (model,),
            )
        )  # fmt: skip
    return found


def _held_out(model: str, source: str, data: Path, out: Path) -> Step:
    name = Path(model).name
    return Step(
        f"held-out {name} {source}",
        MMFREE,
        (
            "eval", "--model", model, "--step", "best", "--data", str(data / source),
            "--window", str(WINDOW), "--output", str(out / "held-out" / name / source),
            "--no-progress",
        ),
        f"held-out/{name}/{source}", 150, (model,),
    )  # fmt: skip

"""Everything that is measured of a trained model and its twin, in one command that goes on.

`python -m mmfree_jax.experiments.study.measure_model --run runs/61M --twin runs/61M-transformer`
runs the commands of `model_steps`, several beside each other on one device, for `--minutes` at
most. What is done is not done again by the same command; a step that fails or is cut off is told
and ends no other. `after/steps.json` keeps of each the command, commit, device, date and seconds,
without which `publish_model` takes none of its numbers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmfree_jax.children import Children
from mmfree_jax.data.dataset import HELDOUT, open_dataset
from mmfree_jax.errors import DataError, MMFreeError
from mmfree_jax.experiments.bench.records import cpu_name
from mmfree_jax.experiments.study.corpus import GROUPS
from mmfree_jax.experiments.study.model_steps import PROMPTS, Step, steps
from mmfree_jax.experiments.sweep.process import code_version
from mmfree_jax.files import write_text
from mmfree_jax.infer.agreement import PROMPT_TOKENS
from mmfree_jax.installed import versions
from mmfree_jax.saved.best import best_checkpoint
from mmfree_jax.text_files import read_json

RECORD = "steps.json"
OF_A_RUN = ("config.yaml", "summary.json", "metrics.jsonl")
_STOP_S = 5.0
_LEAST_S = 20.0  # a step that has less is not begun


def device_name() -> str:
    """What computes here: the GPU with its driver, else the processor."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{cpu_name()}, {os.cpu_count()} cores"
    return found.strip().splitlines()[0]


def read_record(out: Path) -> dict[str, dict[str, Any]]:
    """What earlier calls made of each step; nothing where none has run."""
    file = out / RECORD
    return read_json(file) if file.exists() else {}


class _Runner:
    """Steps beside each other, each recorded as it ends."""

    def __init__(self, out: Path, deadline: float, children: Children) -> None:
        self._out, self._deadline, self._children = out, deadline, children
        self._record = read_record(out)
        self._about = {
            "commit": code_version(),
            "device": device_name(),
            "versions": versions("jax", "jaxlib", "numpy", "onnxruntime", "torch", "transformers"),
        }
        self._running: list[tuple[Step, subprocess.Popen[Any], float, str]] = []

    def is_done(self, step: Step) -> bool:
        """Whether the same command has ended well on the same checkpoints, and left its file."""
        kept = self._record.get(step.name, {})
        is_same = kept.get("command") == step.command and kept.get("code") == 0
        is_of_these = kept.get("checkpoints") == _checkpoints(step)
        return is_same and is_of_these and (self._out / step.makes).exists()

    def run(self, wanted: list[Step], jobs: int) -> list[Step]:
        """Runs what is not done; returns what still is not."""
        waiting = [step for step in wanted if not self.is_done(step)]
        print(f"{len(wanted) - len(waiting)} of {len(wanted)} steps are done", flush=True)
        while waiting or self._running:
            ready = next((s for s in waiting if not missing(s)), None)
            has_time = time.time() + _LEAST_S < self._deadline
            if ready is not None and has_time and len(self._running) < jobs:
                waiting.remove(ready)
                self._start(ready)
                continue
            if not self._running:
                break
            self._collect()
            time.sleep(0.2)
        return [step for step in wanted if not self.is_done(step)]

    def _start(self, step: Step) -> None:
        target = self._out / step.makes
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (self._out / "logs").mkdir(exist_ok=True)
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        log = self._log(step)
        with log.open("wb") as errors, self._printed(step).open("wb") as printed:
            process = self._children.start(
                [sys.executable, "-m", step.module, *step.arguments],
                stdout=printed if step.prints else errors,
                stderr=errors,
            )
        self._running.append((step, process, time.time(), begun))

    def _log(self, step: Step) -> Path:
        return self._out / "logs" / f"{step.name.replace(' ', '-')}.log"

    def _printed(self, step: Step) -> Path:
        return self._log(step).with_suffix(".out") if step.prints else Path(os.devnull)

    def _collect(self) -> None:
        for item in list(self._running):
            step, process, start, begun = item
            seconds = time.time() - start
            is_late = seconds > step.seconds or time.time() > self._deadline
            if self._children.has_ended(process):
                code = process.returncode
            elif is_late:
                self._children.kill(process)
                code = -9
            else:
                continue
            self._running.remove(item)
            if code == 0 and step.prints:
                self._printed(step).replace(self._out / step.makes)
            if code == 0 and not (self._out / step.makes).exists():
                code = 1
            self._record[step.name] = {
                "command": step.command,
                "code": code,
                "begun": begun,
                "seconds": round(seconds, 1),
                "checkpoints": _checkpoints(step),
                **self._about,
            }
            write_text(self._out / RECORD, json.dumps(self._record, indent=1) + "\n")
            said = "done" if code == 0 else f"FAILED ({code}): {self._last_line(step)}"
            print(f"{seconds:6.1f} s  {step.name}: {said}", flush=True)

    def _last_line(self, step: Step) -> str:
        lines = self._log(step).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no message")


def run_steps(wanted: list[Step], out: Path, *, deadline: float, jobs: int) -> list[Step]:
    """Runs the steps that are not done, as far as time goes, and records each as it ends.

    Args:
      wanted: in the order in which they are begun.
      out: folder of the results; made where it is not there.
      deadline: Unix time at which all is ended.
      jobs: most steps beside each other.

    Returns:
      The steps that are not done: failed, cut off, without what they need, or out of time.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Children(_STOP_S) as children:
        return _Runner(out, deadline, children).run(wanted, jobs)


def _checkpoints(step: Step) -> dict[str, int]:
    """The best checkpoint of each run that a step reads: one that is trained on has another."""
    runs = (run for run in step.runs if Path(run).exists())
    return {Path(run).name: best_checkpoint(Path(run)) for run in runs}


def missing(step: Step) -> list[str]:
    """What a step needs and is not there; a run is there when it has ended."""
    ended = [f"{run}/summary.json" for run in step.runs]
    return [place for place in (*ended, *step.needs) if not Path(place).exists()]


def keep_records(run: Path, out: Path) -> None:
    """Copies what a run says of its training, where it has ended."""
    target = out / "runs" / run.name
    if all((run / name).is_file() for name in OF_A_RUN):
        target.mkdir(parents=True, exist_ok=True)
        for name in OF_A_RUN:
            shutil.copyfile(run / name, target / name)
    else:
        print(f"{run}: has not ended, or is not there", flush=True)


def _prompts(data: Path) -> int:
    held_out = open_dataset(data, HELDOUT)
    lengths = (len(held_out.document(i)) for i in range(held_out.num_documents))
    count = sum(length >= PROMPT_TOKENS for length in lengths)
    if not count:
        raise DataError(f"{data} has no held-out document of {PROMPT_TOKENS} tokens")
    return min(count, 16)


def main() -> int:
    """Runs the steps; 1 where one of them is left."""
    parser = argparse.ArgumentParser(description="Measure a trained model and its twin.")
    parser.add_argument("--run", type=Path, required=True, help="run of the model")
    parser.add_argument("--twin", type=Path, required=True, help="run of its twin")
    parser.add_argument("--data", type=Path, default=Path("data/study"), help="prepared folders")
    parser.add_argument("--sources", nargs="+", default=list(GROUPS), help="names of them")
    parser.add_argument("--out", type=Path, default=Path("after"), help="receives what is made")
    parser.add_argument("--tasks", type=Path, default=Path("tasks"), help="data of the six tasks")
    parser.add_argument("--task-limit", type=int, help="documents of each task (all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which all is ended")
    parser.add_argument("--jobs", type=int, default=6, help="steps beside each other")
    given = parser.parse_args()
    deadline = time.time() + 60 * given.minutes
    # Each takes a share of the GPU's memory, where nobody says otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.88 / given.jobs:.2f}")
    try:
        wanted = steps(
            str(given.run), str(given.twin), given.sources, data=given.data, out=given.out,
            tasks=given.tasks, task_limit=given.task_limit,
            documents=_prompts(given.data / given.sources[0]),
        )  # fmt: skip
        for run in (given.run, given.twin):
            keep_records(run, given.out)
        lines = (json.dumps({"prompt": p, "seed": n}) + "\n" for n, p in enumerate(PROMPTS, 1))
        write_text(given.out / "prompts.jsonl", "".join(lines))
        left = run_steps(wanted, given.out, deadline=deadline, jobs=given.jobs)
    except MMFreeError as e:
        print(f"measure_model: {e}", file=sys.stderr)
        return 2
    for step in left:
        why = ", ".join(missing(step))
        print(f"left: {step.name}" + (f" (there is no {why})" if why else ""), flush=True)
    print("all steps are done" if not left else f"{len(left)} steps are left: the same command")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())

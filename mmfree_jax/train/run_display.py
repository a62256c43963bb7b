"""How a run looks on the terminal: its records as lines, and the one that is drawn anew."""

from contextlib import AbstractContextManager

from mmfree_jax.progress import Display
from mmfree_jax.readable import format_count, format_seconds, indented
from mmfree_jax.saved.history import Record
from mmfree_jax.train.held_out import losses_by_source

TRAINING = "training"


def format_record(record: Record, steps: int) -> str:
    """A record in plain words: one line, and for a sample its text below it."""
    where = f"step {record['step']:>{len(str(steps))}}/{steps}"
    if record["kind"] == "eval":
        parts = [f"held-out loss {record['loss']:.4f}", f"perplexity {record['perplexity']:.2f}"]
        if record.get("bits_per_byte"):
            parts.append(f"{record['bits_per_byte']:.4f} bits/byte")
        parts += [f"{source} {loss:.4f}" for source, loss in losses_by_source(record)]
        return f"{where}  " + "  ".join(parts)
    if record["kind"] == "tasks":
        scores = scores_of(record)
        shown = [f"{n} {v:.4f}" for n, v in scores.items() if not n.endswith("_stderr")]
        return f"{where}  tasks: {'  '.join(shown) or 'none done'}"
    if record["kind"] == "sample":
        return f"{where}  sample:\n{indented(record['text'])}"
    if record["kind"] == "event":
        return f"{where}  {record['event']}"
    values = _values(record)
    order = ("loss", "grad", "skipped", "lr", "rate", "mfu", "zero", "changed", "eta")
    return f"{where}  " + "  ".join(values[name] for name in order if name in values)


def scores_of(record: Record) -> dict[str, float]:
    """The numbers of a record of tasks, by name."""
    return {name: value for name, value in record.items() if "/" in name}


def _values(record: Record) -> dict[str, str]:
    """What a train record has to say, by name."""
    values = {"lr": f"lr {record['learning_rate']:.2e}"}
    if record.get("loss") is not None:
        values |= {"loss": f"loss {record['loss']:.4f}", "grad": f"grad {record['grad_norm']:.2f}"}
    if record.get("skipped_steps"):
        values["skipped"] = f"skipped {record['skipped_steps']}"
    if record.get("tokens_per_s"):
        values["rate"] = f"{format_count(record['tokens_per_s'])} tok/s"
    if record.get("mfu") is not None:
        values["mfu"] = f"MFU {record['mfu']:.1%}"
    if record.get("zero_share") is not None:
        values["zero"] = f"zero {record['zero_share']:.1%}"
    if record.get("changed_share") is not None:
        values["changed"] = f"changed {record['changed_share']:.2%}"
    if record.get("eta_s") is not None:
        values["eta"] = f"ETA {format_seconds(record['eta_s'])}"
    return values


class RunDisplay:
    """Shows a run of `steps` steps on a display."""

    def __init__(self, display: Display, steps: int) -> None:
        self._display, self._steps = display, steps
        self._values: tuple[str, ...] = ()

    def write(self, record: Record) -> None:
        """Shows a record: training in place where that can be done, all else as lines.

        Where the time has gone is shown at the end, not here.
        """
        if record["kind"] == "goodput":
            return
        if record["kind"] == "train":
            values = _values(record)
            # The most important first: a narrow terminal shows no more.
            order = ("loss", "eta", "skipped", "rate", "mfu", "grad", "lr", "zero", "changed")
            self._values = tuple(values[name] for name in order if name in values)
            self.step(record["step"])
        if record["kind"] != "train" or not self._display.is_live or record["step"] == self._steps:
            self._display.line(format_record(record, self._steps))

    def step(self, done: int) -> None:
        """Shows that a step is done."""
        if self._display.is_live and self._display.state.stage == TRAINING:
            self._display.update(done, self._steps, *self._values, count=f"{done}/{self._steps}")

    def stage(self, text: str) -> None:
        """Says what begins now."""
        self._display.stage(text)

    def during(self, text: str) -> AbstractContextManager[None]:
        """A stage within another."""
        return self._display.during(text)

    def part(self, done: int, total: int) -> None:
        """Shows how far the stage is."""
        self._display.update(done, total)

    def message(self, text: str) -> None:
        """Says a line."""
        self._display.line(text)

    def close(self) -> None:
        """Takes the live line away."""
        self._display.close()

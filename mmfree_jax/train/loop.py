"""The training loop.

Each turn dispatches one step and then reads the metrics of the step before, so that the
device always has a step queued while the host reads and logs. Batches are made and put on the
devices by a thread; what the loop waits for one counts as lost to data only while no step runs.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.data.ahead import Ahead
from mmfree_jax.data.pipeline import make_train_iterator
from mmfree_jax.data.verification import Verification
from mmfree_jax.errors import TrainingError
from mmfree_jax.model import LanguageModel
from mmfree_jax.parallel.sharding import place_batch, process_rows
from mmfree_jax.parallel.watchdog import Watchdog
from mmfree_jax.quantizer_config import Form
from mmfree_jax.saved.checkpoint import Checkpointer
from mmfree_jax.saved.local_copies import LocalCopies
from mmfree_jax.train.best import BestSteps
from mmfree_jax.train.held_out import evaluate
from mmfree_jax.train.metrics import Stopwatch, TernaryMonitor, jit_ternary_shares
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.profiler import Profiler
from mmfree_jax.train.recorder import Recorder
from mmfree_jax.train.report import Summary, write_report
from mmfree_jax.train.run_display import TRAINING
from mmfree_jax.train.schedule import schedule_values
from mmfree_jax.train.setup import Run, checkpoint_metadata
from mmfree_jax.train.step import TrainState, jit_eval_step, jit_train_step, traced_config
from mmfree_jax.train.stop import STOP_CODES, Consensus, StopRequest, reason_of
from mmfree_jax.train.task_evaluation import GO_ON, OUT_OF_TIME, left_out, score_tasks

Sampler = Callable[..., str]
_Batch = dict[str, jax.Array]

_LOOK_S = 0.001
"""While a batch is late: how often the loop looks whether the devices have run out of work."""


class Loop:
    """One session of a run: its compiled programs and what it has under way."""

    def __init__(
        self,
        run: Run,
        recorder: Recorder,
        checkpointer: Checkpointer,
        verification: Verification,
        request: StopRequest,
        clock: Callable[[], float],
        sampler: Sampler | None,
        on_step: Callable[[int], None] | None,
        watchdog: Watchdog | None,
        best: BestSteps | None = None,
        copies: LocalCopies | None = None,
    ) -> None:
        self._beat = watchdog.beat if watchdog else lambda place: None
        self._agree = Consensus(run.mesh, 4)
        self._copies = copies
        self._best, self._agree_now = best, Consensus(run.mesh, 1)
        self._run, self._recorder, self._checkpointer = run, recorder, checkpointer
        self._verification = verification
        self._request, self._clock, self._on_step = request, clock, on_step
        self._sampler = sampler or _default_sampler
        self._began = self._saved_at = clock()
        evaluated = traced_config(run.config)
        self._eval_step = run.programs.later(
            "evaluation", lambda: jit_eval_step(evaluated, run.mesh), evaluated
        )
        model = run.config.model
        measure = run.programs.later("ternary shares", lambda: jit_ternary_shares(model), evaluated)
        self._monitor = TernaryMonitor(model, measure)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._ternary: dict[str, Any] = {}
        self._batches: Ahead[_Batch] | None = None
        profile = run.run_dir / "profile"
        self._profiler = Profiler(run.config.log.profile_steps, profile, self._read_metrics)
        self.compile_seconds = 0.0

    @property
    def _end(self) -> int:
        """The step after which this session ends."""
        config = self._run.config
        return min(config.steps, config.stop_at or config.steps)

    def run(self, state: TrainState, start: int) -> Summary:
        """Trains from `start` to the end, or to where it is told to stop."""
        config, recorder, watch = self._run.config, self._recorder, self._recorder.watch
        stopped_by, done, end = None, start, self._end
        if start and _is_due(config.eval.tasks_every_steps, start):
            self._score_tasks(state, start)  # if a signal ended it before
        if start < end:
            padded, mesh = self._run.step_config.batch_size, self._run.mesh
            rows = process_rows(mesh, (padded, config.data.seq_len))
            self._batches = batches = make_train_iterator(
                config.data,
                batch_size=config.batch_size,
                padded=padded,
                rows=rows,
                start_row=self._run.origin.row_at(start, config.batch_size),
                place=lambda batch: place_batch(mesh, batch, rows, padded),
            )
            batch = next(batches)
            step_of = self._compile(state, batch, start)
            recorder.start()
            recorder.progress.stage(TRAINING)
            recorder.progress.step(start)
        while done < end and stopped_by is None:
            self._profiler.before(done + 1)
            with watch.section("step"):
                form = self._form(done)
                state, metrics = step_of[form](state, batch)
                done += 1
                self._read_metrics()
                self._pending = (done, metrics)
            if self._on_step:
                self._on_step(done)
            if done < end:
                batch = next_batch(batches, watch, metrics["loss"])
            stopped_by = self._after_step(state, done)
        if stopped_by is None and done < config.steps:
            stopped_by = "stop_at"
        recorder.sync()
        self._run.publish()
        if stopped_by is None:
            recorder.check_learnt(done)
        if stopped_by in STOP_CODES:  # whoever sends one may not wait for long
            recorder.message(f"{stopped_by}: saved step {done}; run the same command to go on")
        else:
            self._evaluate(state, done)
            self._score_tasks(state, done)
            self._sample(state, done)
            if stopped_by == "stop_at":
                recorder.message(
                    "stop_at reached: run the same command without --stop-at, or with a later "
                    "one, to go on"
                )
            elif stopped_by:
                recorder.message(f"{stopped_by} reached: run the same command to go on")
        with watch.section("checkpoint"), recorder.progress.during("saving the checkpoint"):
            self._checkpointer.wait()
            if self._best is not None:  # the last evaluation may come after the last save
                self._checkpointer.prune()
        with recorder.progress.during("writing the summary"):
            return write_report(
                self._run, recorder, done, stopped_by, self.compile_seconds, self._best
            )

    def _form(self, done: int) -> Form:
        """What the next step trains; the change from one form to another is an event."""
        quantizer, steps = self._run.config.quantizer, self._run.config.steps
        form = quantizer.form_at(done, steps)
        if done and form != quantizer.form_at(done - 1, steps):
            self._recorder.event(done, f"the layers that are trained are {form} from here on")
        return form

    def _compile(
        self, state: TrainState, batch: dict[str, jax.Array], start: int
    ) -> dict[Form, Callable[..., Any]]:
        """Compiles a step for each form that this session trains, ahead of the first call.

        So that the time is known, and what cannot be compiled does not end a run in its middle.
        """
        run, begin, loaded = self._run, self._clock(), self._run.programs.loaded
        config = traced_config(run.step_config)
        optimizer = make_optimizer(config.optimizer, config.model)
        self._recorder.progress.stage("compiling the training step")
        forms = run.config.quantizer.forms(start, self._end, run.config.steps)
        steps: dict[Form, Callable[..., Any]] = {}
        with self._recorder.watch.section("compile"), jax.set_mesh(run.mesh):
            values = schedule_values(run.config.optimizer, run.config.steps, run.config.quantizer)
            schedule = jax.device_put(values, NamedSharding(run.mesh, P()))
            for form in forms:
                make = functools.partial(jit_train_step, config, optimizer, run.mesh, form)
                step = run.programs.get(f"{form} step", make, config, (state, batch, schedule))
                steps[form] = functools.partial(_with_schedule, step, schedule)
                self._beat("compiling")
        self.compile_seconds = self._clock() - begin
        of_forms = "" if forms == ("ternary",) else f" ({', '.join(forms)})"
        is_loaded = run.programs.loaded - loaded == len(forms)
        done = "loaded" if is_loaded else "compiled"
        by_whom = ", as an earlier start compiled it" if is_loaded else ""
        self._recorder.message(
            f"{done} the training step{of_forms} in {self.compile_seconds:.1f} s{by_whom}"
        )
        self._tell_of_programs()
        return steps

    def _tell_of_programs(self) -> None:
        if (note := self._run.programs.take_note()) is not None:
            self._recorder.message(f"warning: {note}")

    def _read_metrics(self) -> None:
        """Reads the metrics of the step before, and records them when they are due."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        config, recorder = self._run.config, self._recorder
        with recorder.watch.section("step"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._beat(f"step {step}")
            recorder.on_step(step, values)
            if step % config.log.every_steps == 0 or step == config.steps or self._ternary:
                extra, self._ternary = self._ternary, {}
                recorder.train_record(step, extra)

    def _after_step(self, state: TrainState, done: int) -> str | None:
        """Evaluates, samples and saves as due; returns why to stop, or None."""
        config, watch = self._run.config, self._recorder.watch
        now, is_first = self._clock(), jax.process_index() == 0
        minutes = config.checkpoint.every_minutes
        out_of_time = bool(config.max_minutes) and now - self._began >= config.max_minutes * 60
        save_by_time = bool(minutes) and now - self._saved_at >= minutes * 60
        told, out_of_time, save_by_time, failed = self._agree(
            self._request.wish,
            is_first and out_of_time,
            is_first and save_by_time,
            self._checkpointer.has_failed or self._verification.has_failed,
        )
        if failed:
            self._end_in_failure()
        is_last = done == config.steps
        must_save = bool(done == self._end or told or out_of_time or save_by_time)
        must_save |= done % config.checkpoint.every_steps == 0
        must_save |= done in config.checkpoint.at_steps

        if _is_due(config.log.ternary_every_steps, done) or is_last:
            if config.log.ternary_every_steps:
                with watch.section("step"):
                    jax.block_until_ready(self._pending)
                with watch.section("eval"):
                    self._ternary = self._monitor(state.params)
            self._read_metrics()
        if _is_due(config.eval.every_steps, done):
            self._evaluate(state, done)
        if _is_due(config.eval.tasks_every_steps, done) and not told:
            told = self._score_tasks(state, done)
            must_save |= bool(told)
        if _is_due(config.eval.sample_every_steps, done):
            self._sample(state, done)
        if must_save or self._is_best(done):
            self._save(state, done, self._checkpointer)
            self._saved_at = self._clock()
        elif self._copies is not None and _is_due(config.checkpoint.local_every_steps, done):
            self._save(state, done, self._copies)
        if told:
            return reason_of(told)
        return "max_minutes" if out_of_time and done < self._end else None

    def _is_best(self, done: int) -> bool:
        """Whether this step is one of the best so far, as process 0 finds, who has the records."""
        config = self._run.config
        every = (config.eval.every_steps, config.eval.tasks_every_steps)
        if not config.checkpoint.keep_best or not any(_is_due(n, done) for n in every):
            return False
        best = self._best
        mine = best is not None and done in best.among([*self._checkpointer.steps, done])
        return bool(self._agree_now.at_once(int(mine))[0])

    def _end_in_failure(self) -> NoReturn:
        self._verification.check()
        if self._checkpointer.has_failed:
            self._checkpointer.wait()
        self._checkpointer.abandon()  # it would wait for the process whose part failed
        raise TrainingError("another process has ended the run: see its message")

    def _save(self, state: TrainState, done: int, saver: Checkpointer | LocalCopies) -> None:
        """Starts a checkpoint or a local copy, once everything up to its step is on record."""
        self._read_metrics()
        with self._recorder.watch.section("checkpoint"):
            recorder = self._recorder
            goodput = recorder.goodput_record(done)
            recorder.sync()
            self._run.publish()  # no checkpoint outlives the records in a bucket either
            metadata = checkpoint_metadata(
                self._run, done, recorder.meter, recorder.seconds, goodput
            )
            saver.save(done, state, metadata)
        self._beat(f"saving step {done}")

    def _evaluate(self, state: TrainState, done: int) -> None:
        """Held-out loss, unless this step has one already."""
        batches, last = self._run.eval_batches, self._recorder.last.get("eval")
        if batches is None or (last is not None and last["step"] == done):
            return
        self._read_metrics()
        progress = self._recorder.progress
        with self._recorder.watch.section("eval"), progress.during("evaluating"):

            def on_batch(number: int) -> None:
                progress.part(number, len(batches))
                self._beat(f"evaluation at step {done}")

            losses = evaluate(self._eval_step, state.params, batches, self._run.mesh, on_batch)
        self._recorder.eval_record(done, losses)
        self._tell_of_programs()

    def _score_tasks(self, state: TrainState, done: int) -> int:
        """Scores the tasks, unless this step has scores; the wish to stop that ended it, or 0."""
        run, last, begin = self._run, self._recorder.last.get("tasks"), self._clock()
        options = run.config.eval
        if run.tasks is None or (last is not None and last["step"] == done):
            return 0
        self._read_metrics()

        def ask() -> int:
            self._beat(f"tasks at step {done}")
            late = self._clock() - begin >= options.tasks_minutes * 60
            answer = OUT_OF_TIME if late and jax.process_index() == 0 else GO_ON
            wish = self._request.wish
            return self._agree_now.at_once(OUT_OF_TIME + wish if wish else answer)[0]

        with self._recorder.watch.section("eval"), self._recorder.progress.during("scoring tasks"):
            found = score_tasks(run.tasks, state.params, run.config, run.tokenizer, run.mesh, ask)
        if found.ended_by > OUT_OF_TIME:
            return found.ended_by - OUT_OF_TIME
        self._recorder.tasks_record(done, found.numbers)
        if found.left_out:
            self._recorder.event(done, left_out(found.left_out, options.tasks_minutes))
        return 0

    def _sample(self, state: TrainState, done: int) -> None:
        """A sample text, unless this step has one already."""
        run, last = self._run, self._recorder.last.get("sample")
        options = run.config.eval
        is_asked = options.sample_tokens and run.tokenizer is not None
        if not is_asked or (last is not None and last["step"] == done):
            return
        self._read_metrics()
        with self._recorder.watch.section("eval"), self._recorder.progress.during("sampling"):
            text = self._sampler(
                LanguageModel(run.config.model),
                state.params,
                run.tokenizer,
                options.sample_prompt,
                max_new_tokens=options.sample_tokens,
                temperature=options.sample_temperature,
                seed=done,
            )
        self._recorder.sample(done, options.sample_prompt, text)

    def close(self) -> None:
        """Stops the profiler and the data threads."""
        with contextlib.suppress(Exception):
            self._profiler.stop()
        if self._batches is not None:
            self._batches.close()


def next_batch(batches: Ahead[_Batch], watch: Stopwatch, under_way: Any) -> _Batch:
    """The next batch; the time until it is there goes to "step" while a step runs, else to "data".

    While the devices are at work nothing is lost by waiting.

    Args:
      batches: made ahead.
      watch: of the loop.
      under_way: an array that the step dispatched last makes.
    """
    with watch.section("step"):
        while not batches.wait(_LOOK_S) and not under_way.is_ready():
            pass
    with watch.section("data"):
        return next(batches)


def _with_schedule(compiled: Any, schedule: Any, state: TrainState, batch: Any) -> Any:
    return compiled(state, batch, schedule)


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _default_sampler(*args: Any, **kwargs: Any) -> str:
    from mmfree_jax.infer import sample_text

    return sample_text(*args, **kwargs)

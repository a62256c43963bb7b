"""Turn after turn: requests take slots, prompts are read in pieces, rows are given tokens.

A turn reads some pieces of prompts, then gives the device one decoding call over all rows that
answer. On a GPU the results of a call are looked at while the next one runs.
"""

import time
from collections import deque
from dataclasses import dataclass

import jax

from mmfree_jax.errors import MMFreeError
from mmfree_jax.serve.batch import Batch, Piece
from mmfree_jax.serve.job import Job, Outbox, prompt_scores, token_scores
from mmfree_jax.serve.plan import Plan
from mmfree_jax.serve.prefix_cache import PrefixCache
from mmfree_jax.serve.programs import Given
from mmfree_jax.serve.requests import End
from mmfree_jax.serve.row_sampling import DRAWS
from mmfree_jax.serve.session_store import SessionStore

TIME_IS_OVER = "the time limit of the request, or of the server, is over"
_NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or a number of the sampling is "
    "out of all bounds"
)


@dataclass(frozen=True)
class _Call:
    """A decoding call that the device works on: whose rows, and where they lie in the results."""

    jobs: list[Job]
    places: list[int]
    given: Given


class Scheduler:
    """The jobs that have a slot. Owned by the engine's thread.

    Attributes:
      prompt_tokens: of prompts, read or cached.
    """

    def __init__(
        self, batch: Batch, plan: Plan, cache: PrefixCache, store: SessionStore, outbox: Outbox
    ) -> None:
        self._batch, self._plan, self._cache, self._store = batch, plan, cache, store
        self._outbox = outbox
        self._jobs: list[Job] = []
        self._free = list(reversed(range(plan.slots)))
        self._calls: deque[_Call] = deque()
        self.prompt_tokens = 0

    @property
    def running(self) -> int:
        """Jobs that have, or had, a slot and have not ended."""
        return sum(not job.ended for job in self._jobs)

    @property
    def has_slot(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._jobs or self._calls)

    def admit(self, job: Job) -> None:
        """Gives a job a free slot, its session or the longest cached beginning of its prompt."""
        self._jobs.append(job)
        job.begun_s = time.monotonic()
        job.slot = self._free.pop()
        prompt = job.request.prompt
        self.prompt_tokens += len(prompt)
        found = job.start and self._batch.sized(job.start)
        if job.caches and not job.request.echo_logprobs:
            job.cached, found = self._cache.find(prompt)
        if found is None:
            self._batch.clear(job.slot)
        else:
            self._batch.put(job.slot, found)
        self._start_reading(job, prompt, job.cached)

    def turn(self) -> None:
        """Reads, decodes, and gives out what has come.

        Raises:
          Exception: of the device; every job is then lost (`fail`).
        """
        self._read()
        self._decode()
        while len(self._calls) > (self._plan.ahead if self._may_decode() else 0):
            self._finish(self._calls.popleft())
        self._jobs = [job for job in self._jobs if not job.ended]

    def end_cancelled(self, *, everyone: bool = False) -> None:
        """Ends the jobs that were cancelled or are out of time; `everyone`: as if cancelled."""
        for job in self._jobs:
            if job.cut_end is not None:  # It will end by itself, and soon.
                continue
            if everyone or job.handle.cancelled:
                self._cancel(job)
            elif job.late:
                self._end(job, End("timeout", job.usage(), TIME_IS_OVER), save=False)
        self._jobs = [job for job in self._jobs if not job.ended]

    def fail(self, message: str) -> None:
        """Ends every job with an error and makes the slots anew."""
        for job in self._jobs:
            if not job.ended:
                self._outbox.end(job, "error", message)
        self._jobs, self._free = [], list(reversed(range(self._plan.slots)))
        self._calls.clear()
        self._cache.clear()
        self._batch.reset()

    def _start_reading(self, job: Job, tokens: tuple[int, ...] | list[int], place: int) -> None:
        job.reading, job.place, job.running = tokens, place, False
        job.pieces = self._plan.pieces(len(tokens) - place)
        if not job.pieces:
            self._has_read(job)

    def _read(self) -> None:
        """As many pieces as a turn may read; where nothing runs beside them, waits for them."""
        budget, read = self._plan.turn_tokens, False
        while budget > 0 and (jobs := self._next_pieces()):
            pieces = [_next_piece(job) for job in jobs]
            if jobs[0].request.echo_logprobs and jobs[0].cut_end is None:
                jobs[0].echoed.append((len(pieces[0].tokens), self._batch.score(pieces[0])))
            else:
                self._batch.read(pieces)
            read = True
            for job, piece in zip(jobs, pieces, strict=True):
                budget -= len(piece.tokens)
                self._advance(job, len(piece.tokens))
        if read and not self._may_decode():
            self._batch.wait()

    def _next_pieces(self) -> list[Job]:
        """Jobs whose next pieces one call reads: that of the first, and others of its length."""
        reading = [job for job in self._jobs if job.pieces and not job.ended]
        if not reading:
            return []
        first = reading[0]
        if first.request.echo_logprobs:
            return [first]
        length = self._plan.padded(first.pieces[0])
        alike = [
            job
            for job in reading
            if self._plan.padded(job.pieces[0]) == length and not job.request.echo_logprobs
        ]
        return alike[: self._plan.piece_rows[length]]

    def _advance(self, job: Job, count: int) -> None:
        assert job.slot is not None
        job.place += count
        del job.pieces[0]
        if job.caches:
            beginning = job.reading[: job.place]
            if not self._cache.holds(beginning):
                self._cache.add(beginning, self._batch.take(job.slot))
        if not job.pieces:
            self._has_read(job)

    def _has_read(self, job: Job) -> None:
        """Lets a job answer whose prompt was read, or ends it where nothing is left to do."""
        request = job.request
        assert job.slot is not None
        if job.cut_end is not None:
            self._end(job, job.cut_end)
            return
        if request.echo_logprobs:
            self._outbox.put(job, prompt_scores(job))
            job.echoed.clear()
        if request.max_tokens == 0:
            self._end(job, End("length", job.usage()))
            return
        if request.save_as is not None:
            job.after_prompt = self._batch.take(job.slot)
        self._batch.begin(job.slot, request)
        job.running = True

    def _may_decode(self) -> list[Job]:
        return [job for job in self._jobs if job.running and job.given < job.request.max_tokens]

    def _decode(self) -> None:
        jobs = self._may_decode()
        if not jobs:
            return
        slots = [job.slot for job in jobs if job.slot is not None]
        draw = DRAWS[max(DRAWS.index(job.draw) for job in jobs)]
        given, places = self._batch.decode(slots, draw)
        self._calls.append(_Call(jobs, places, given))
        for job in jobs:
            job.given += self._plan.steps
            # Nothing more will be asked of the slot: the device does its work in order.
            if job.given >= job.request.max_tokens and job.request.save_as is None:
                self._release(job)

    def _finish(self, call: _Call) -> None:
        """Gives out the tokens of a call; waits for the device."""
        given = jax.device_get(call.given)
        for job, place in zip(call.jobs, call.places, strict=True):
            if job.ended or not job.running:
                continue
            if not given.sound_b[place]:
                self._end(job, End("error", job.usage(), _NOT_FINITE))
                continue
            ids = [token for token in given.tokens_bN[place].tolist() if token >= 0]
            scores = ()
            if job.request.logprobs is not None:
                logprobs, likeliest, theirs = (x[place, : len(ids)] for x in given.scores)
                scores = token_scores(logprobs, likeliest, theirs, job.request.logprobs)
            if ids:
                self._outbox.tokens(job, ids, scores)
            if given.stopped_b[place]:
                self._end(job, End("stop", job.usage()))
            elif len(job.answer) >= job.request.max_tokens:
                self._end(job, End("length", job.usage()))

    def _cancel(self, job: Job) -> None:
        """Ends a job now, or where what is kept of it is to be saved, once that was read again."""
        keep = job.handle.keep
        kept = job.answer if keep is None else job.answer[: max(0, keep)]
        end = End("cancelled", job.usage(len(kept)))
        if keep is None or job.after_prompt is None or job.slot is None:
            self._end(job, end, save=False)
            return
        job.cut_end = end
        self._batch.put(job.slot, job.after_prompt)
        self._start_reading(job, kept, 0)

    def _end(self, job: Job, end: End, *, save: bool = True) -> None:
        name = job.request.save_as
        if save and name is not None and end.reason != "error":
            assert job.slot is not None
            try:
                self._store.save(name, self._batch.take(job.slot))
            except MMFreeError as error:
                end = End("error", end.usage, str(error))
        self._release(job)
        self._outbox.finish(job, end)

    def _release(self, job: Job) -> None:
        if job.slot is not None:
            self._free.append(job.slot)
            job.slot = None


def _next_piece(job: Job) -> Piece:
    assert job.slot is not None
    end = job.place + job.pieces[0]
    following = job.reading[end] if end < len(job.reading) else None
    return Piece(job.slot, job.reading[job.place : end], following)

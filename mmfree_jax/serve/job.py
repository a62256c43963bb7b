"""A request on its way through the engine, and what is counted of all of them."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmfree_jax.model import Session
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.requests import (
    End,
    Event,
    PromptScores,
    Reason,
    Request,
    Tokens,
    TokenScore,
    Usage,
)
from mmfree_jax.serve.row_sampling import Draw, draw_of


@dataclass(eq=False)
class Job:
    """A request and where it stands; the engine's thread alone changes it.

    Attributes:
      handle: of whoever asked.
      deadline_s: when it ends as "timeout" (`time.monotonic`).
      draw: what its sampling needs.
      start: the session that it goes on from; None: none.
      slot: of the batch; None: it waits, or needs none any more.
      reading: tokens that are read before it answers: the prompt, or what is kept of an answer.
      place: how many of them were read.
      pieces: lengths in which the others will be.
      cached: tokens of the prompt that needed no reading.
      running: whether it answers.
      given: tokens that the calls so far may have given.
      answer: tokens that it was given.
      echoed: scores of the prompt's pieces (tokens in each, arrays).
      after_prompt: the state to go back to if an answer is cut; kept where a session is saved.
      cut_end: the last event of an answer that was cut, once what is kept of it was read again.
      ended: whether its last event was given.
      begun_s: when it got its slot.
    """

    handle: Handle
    deadline_s: float
    draw: Draw
    start: Session | None = None
    slot: int | None = None
    reading: Sequence[int] = ()
    place: int = 0
    pieces: list[int] = field(default_factory=list)
    cached: int = 0
    running: bool = False
    given: int = 0
    answer: list[int] = field(default_factory=list)
    echoed: list[tuple[int, Any]] = field(default_factory=list)
    after_prompt: Session | None = None
    cut_end: End | None = None
    ended: bool = False
    begun_s: float = 0.0

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.handle.request

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline_s

    @property
    def caches(self) -> bool:
        """Whether what is read now is the beginning of a text, whose states may be shared."""
        return self.start is None and self.cut_end is None

    def usage(self, completion: int | None = None) -> Usage:
        """Tokens so far, or with so many of the answer."""
        count = len(self.answer) if completion is None else completion
        return Usage(len(self.request.prompt), self.cached, count)


def new_job(handle: Handle, start: Session | None, time_limit_s: float) -> Job:
    """A job that waits, for at most the engine's limit and its own (seconds)."""
    request = handle.request
    limit_s = min(time_limit_s, request.time_limit_s or time_limit_s)
    return Job(handle, handle.submitted_s + limit_s, draw_of(request), start)


class Outbox:
    """Hands events to the handles; wakes each event loop once a turn, whatever came.

    Attributes:
      ended: requests that have ended, by reason.
      completion_tokens: given out.
      run_s: mean time of a request in its slot, of late (seconds).
    """

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.completion_tokens = 0
        self.run_s = 1.0
        self._woken: dict[asyncio.AbstractEventLoop, list[Handle]] = {}

    def put(self, job: Job, event: Event) -> None:
        """Gives a job's reader an event."""
        loop = job.handle.put(event)
        if loop is not None:
            self._woken.setdefault(loop, []).append(job.handle)

    def tokens(self, job: Job, ids: list[int], scores: tuple[TokenScore, ...]) -> None:
        """Gives the next tokens of an answer."""
        job.answer += ids
        self.completion_tokens += len(ids)
        self.put(job, Tokens(tuple(ids), scores))

    def end(self, job: Job, reason: Reason, message: str = "", keep: int | None = None) -> None:
        """Gives the last event; `keep` tokens of the answer count, by default all."""
        self.finish(job, End(reason, job.usage(keep), message))

    def finish(self, job: Job, end: End) -> None:
        """Gives a last event that was made before."""
        job.ended, job.running = True, False
        self.ended[end.reason] += 1
        if job.begun_s:
            self.run_s += 0.1 * (time.monotonic() - job.begun_s - self.run_s)
        self.put(job, end)

    def flush(self) -> None:
        """Wakes whoever reads."""
        woken, self._woken = self._woken, {}
        for loop, handles in woken.items():
            # A loop that was closed has no readers any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake_all, handles)


def _wake_all(handles: list[Handle]) -> None:
    for handle in handles:
        handle.wake()


def token_scores(logprobs: Any, ids: Any, values: Any, top: int) -> tuple[TokenScore, ...]:
    """Scores of some places: [N] log-probabilities, [N, 20] likeliest ids and theirs."""
    return tuple(
        TokenScore(float(one), tuple(zip(row[:top].tolist(), theirs[:top].tolist(), strict=True)))
        for one, row, theirs in zip(logprobs, ids, values, strict=True)
    )


def prompt_scores(job: Job) -> PromptScores:
    """The scores of a prompt that was read in pieces; waits for the device."""
    found: list[TokenScore | None] = [None] if job.request.prompt else []
    for count, arrays in job.echoed:
        logprobs, ids, values = (np.asarray(x)[:count] for x in arrays)
        found += token_scores(logprobs, ids, values, job.request.logprobs or 0)
    return PromptScores(tuple(found[: len(job.request.prompt)]))

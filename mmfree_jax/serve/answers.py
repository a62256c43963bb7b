"""One answer as it comes: from the engine's tokens to text, ended by stop strings."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from mmfree_jax.infer.text import AnswerText, Tokenizer
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.serve.requests import End, PromptScores, Tokens, TokenScore, Usage


@dataclass(frozen=True)
class Scored:
    """A token and what it was worth to the model.

    Attributes:
      token: its id.
      offset: where its text begins, in characters of the prompt and the answer.
      score: None for a prompt's first token, which nothing predicts.
    """

    token: int
    offset: int
    score: TokenScore | None


@dataclass(frozen=True)
class Piece:
    """What has come since the last piece.

    Attributes:
      text: whole characters, without any part of a stop string.
      scored: tokens whose text begins in what was given so far, where scores were asked for.
      finish: why the answer ended, "stop" or "length"; None: it goes on.
      usage: of the whole answer, with the last piece.
    """

    text: str
    scored: tuple[Scored, ...] = ()
    finish: str | None = None
    usage: Usage | None = None


@dataclass
class Answer:
    """One choice of a response, from the engine's handle.

    Attributes:
      handle: of the engine.
      tokenizer: of the model.
      stops: strings that end the answer and are no part of it.
      echo: also give the prompt, before the answer.
      prompt_text: of the prompt, where `echo` is set.
    """

    handle: Handle
    tokenizer: Tokenizer
    stops: Sequence[str]
    echo: bool = False
    prompt_text: str = ""
    _waiting: list[Scored] = field(default_factory=list)
    _count: int = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer piece by piece; the last has `finish` and `usage`.

        Raises:
          RequestError: the engine gave the request up.
        """
        prompt = self.handle.request.prompt
        text = AnswerText(self.tokenizer, prompt, self.stops)
        start = len(self.prompt_text) if self.echo else 0
        if self.echo and not self.handle.request.echo_logprobs:
            yield Piece(self.prompt_text)
        new = ""
        async for event in self.handle:
            if isinstance(event, PromptScores):
                # A long prompt takes a while, in which the loop serves others.
                scored = await asyncio.to_thread(self._score_prompt, event)
                yield Piece(self.prompt_text, scored)
            elif isinstance(event, End):
                yield self._end(event, new, text, start)
            elif not text.stopped:  # else it was under way when the stop string was found
                new += self._read(event, text, start)
                if text.stopped:
                    self.handle.cancel(keep=self._count)
                # Where the client or this loop lags behind, several tokens make one piece.
                if new and not self.handle.has_more:
                    yield Piece(new, self._due(start + len(text.text)))
                    new = ""

    def _read(self, event: Tokens, text: AnswerText, start: int) -> str:
        """The text that tokens add, up to the one that completes a stop string."""
        if not self.stops and not event.scores:
            return text.push(*event.ids)
        new = ""
        for place, token in enumerate(event.ids):
            offset = start + text.length
            new += text.push(token)
            self._count += 1
            if event.scores:
                self._waiting.append(Scored(token, offset, event.scores[place]))
            if text.stopped:
                break
        return new

    def _end(self, end: End, new: str, text: AnswerText, start: int) -> Piece:
        given_up = end.reason == "error" or (end.reason == "cancelled" and not text.stopped)
        if given_up or (end.reason == "timeout" and not end.usage.completion_tokens):
            raise _gave_up(end)
        rest = new + text.flush()
        # A stop string's own tokens are left out, as its text is.
        whole = start + len(text.text) if text.stopped else None
        finish = "stop" if text.stopped or end.reason == "stop" else "length"
        return Piece(rest, self._due(whole), finish, end.usage)

    def _due(self, length: int | None) -> tuple[Scored, ...]:
        """Takes out waiting tokens that begin before `length` characters; None: all."""
        due = [s for s in self._waiting if length is None or s.offset < length]
        del self._waiting[: len(due)]
        return tuple(due)

    def _score_prompt(self, event: PromptScores) -> tuple[Scored, ...]:
        """The prompt's tokens, each where its text begins in `prompt_text`."""
        prompt = self.handle.request.prompt
        text = AnswerText(self.tokenizer, (), ())
        scored = []
        for token, score in zip(prompt, event.scores, strict=True):
            scored.append(Scored(token, min(text.length, len(self.prompt_text)), score))
            text.push(token)
        return tuple(scored)


def _gave_up(end: End) -> RequestError:
    """What a client is told of a request that the engine ended."""
    if end.reason == "timeout":
        return RequestError(
            end.message or "the request's time passed before its first token: try again later",
            status=503,
            code="timeout",
            headers={"Retry-After": "5"},
        )
    if end.reason == "cancelled":
        return RequestError(
            "the server stops: try again when it is back",
            status=503,
            code="server_stopping",
            headers={"Retry-After": "5"},
        )
    return RequestError(end.message or "the model failed", status=500, code="engine_failed")

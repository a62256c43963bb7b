"""What the engine is asked and what it answers: token ids in, events out.

Texts, stop strings and templates are the business of whoever asks: who finds a stop string in the
tokens so far cancels the request and may say how many of its tokens count.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from mmfree_jax.errors import ConfigError, DataError, MMFreeError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.ranges import (
    AboveZero,
    Count,
    CountOrZero,
    NotNegative,
    PositiveShare,
    Range,
    Seed,
    Share,
    check_numbers,
)

MOST_LOGPROBS = 20
"""Likeliest tokens that a request may ask for at each place."""
MOST_STOP_IDS = 16
MOST_BIASES = 300

Penalty = Annotated[float, Range(-2, 2)]
Reason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a request ended: a stop token, `max_tokens`, `Handle.cancel`, its time limit, a fault."""

_SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class QueueFull(MMFreeError):
    """As many requests wait as may: try again later.

    Attributes:
      retry_after_s: when a place may be free (seconds).
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosed(MMFreeError):
    """The engine ends, or its device has failed: it takes no requests."""


class UnknownSession(MMFreeError):
    """No session has this name."""


class SessionsFull(MMFreeError):
    """Named sessions hold as much memory as they may."""


@dataclass(frozen=True)
class RowSampling:
    """How the next token of one request is drawn; the defaults sample from the model itself.

    Raises:
      ConfigError: a number outside its range.
    """

    temperature: NotNegative = 1.0
    """Divides the logits; 0: always the likeliest token."""
    top_k: CountOrZero = 0
    """Keep only this many of the likeliest tokens; 0: all."""
    top_p: PositiveShare = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this; 1: all."""
    min_p: Share = 0.0
    """Drop tokens below this share of the likeliest token's probability; 0: none."""
    repetition_penalty: AboveZero = 1.0
    """Above 1, tokens of the prompt and the answer become less likely; 1: off."""
    presence_penalty: Penalty = 0.0
    """Taken from the logits of the tokens of the answer so far."""
    frequency_penalty: Penalty = 0.0
    """Likewise, once for each time that the token occurs in it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit, -100 to 100), each id once, at most 300."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if len(self.logit_bias) > MOST_BIASES:
            raise ConfigError(
                f"logit_bias has {len(self.logit_bias)} entries: give at most {MOST_BIASES}"
            )
        ids = [token for token, _ in self.logit_bias]
        if len(set(ids)) < len(ids):
            raise ConfigError("logit_bias has a token id twice: give each once")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise ConfigError(
                    f"logit_bias of token {token} is {bias!r}: set a value in [-100, 100]"
                )


@dataclass(frozen=True)
class Request:
    """One stream of tokens. Its noise depends on `seed` and `sample` alone.

    Raises:
      ConfigError: a field that no model could serve; what depends on the model, `Engine.submit`
        refuses.
    """

    prompt: tuple[int, ...]
    """Token ids; empty only where `session` goes on."""
    max_tokens: CountOrZero
    """Most tokens of the answer; 0: the prompt is read, scored and saved only."""
    sampling: RowSampling = RowSampling()
    seed: Seed = 0
    """Of the noise."""
    sample: CountOrZero = 0
    """Which of several answers to one prompt this is; each has noise of its own."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; they are not part of it. At most 16."""
    logprobs: Annotated[int, Range(0, MOST_LOGPROBS)] | None = None
    """Also give each token's log-probability and those of so many likeliest tokens; None: no."""
    echo_logprobs: bool = False
    """Also score the prompt's own tokens (`PromptScores`), with as many likeliest as `logprobs`."""
    session: str | None = None
    """A saved session that the prompt is appended to; it stays as it is."""
    save_as: str | None = None
    """Name under which the state after the answer is saved; one of that name is replaced."""
    time_limit_s: AboveZero | None = None
    """Most seconds in the queue and running; None: the engine's own limit alone."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.prompt and self.session is None:
            raise ConfigError("prompt is empty: give at least one token")
        if len(self.stop_ids) > MOST_STOP_IDS:
            raise ConfigError(
                f"stop_ids has {len(self.stop_ids)} entries: give at most {MOST_STOP_IDS}"
            )
        for field in ("session", "save_as"):
            if (name := getattr(self, field)) is not None:
                check_session_name(name, field)

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest, by the model's own logits."""
        return dataclasses.replace(self.sampling, top_k=0, top_p=1.0, min_p=0.0) == RowSampling(0.0)


def check_session_name(name: str, field: str = "session") -> None:
    """Refuses a name that is no plain file name.

    Raises:
      ConfigError: it is empty, too long, or has other signs than letters, digits and "._-".
    """
    if not _SESSION_NAME.fullmatch(name):
        raise ConfigError(
            f"{field} is {name[:120]!r}: use 1 to 100 letters, digits, '.', '_' and '-', with a "
            "letter or digit first"
        )


def check_tokens(request: Request, config: ModelConfig) -> None:
    """Refuses token ids that a model does not have.

    Raises:
      DataError: of the prompt.
      ConfigError: of `stop_ids` or `logit_bias`.
    """
    most = config.vocab_size - 1
    for place, token in enumerate(request.prompt):
        if not 0 <= token <= most:
            raise DataError(
                f"prompt has token id {token} at position {place}: the model's ids go from 0 to "
                f"{most}"
            )
    biased = tuple(token for token, _ in request.sampling.logit_bias)
    for field, ids in (("stop_ids", request.stop_ids), ("logit_bias", biased)):
        for token in ids:
            if not 0 <= token <= most:
                raise ConfigError(f"{field} has {token}: the model's ids go from 0 to {most}")


@dataclass(frozen=True)
class TokenScore:
    """What a token is worth to the model, before temperature, penalties and filters.

    Attributes:
      logprob: of the token (nats).
      top: the likeliest tokens at its place and their log-probabilities, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptScores:
    """The prompt's own tokens, scored; comes before the first `Tokens`.

    Attributes:
      scores: one a token of the prompt; None for the first, which nothing predicts.
    """

    scores: tuple[TokenScore | None, ...]


@dataclass(frozen=True)
class Tokens:
    """The next tokens of the answer; one or several at a time.

    Attributes:
      ids: at least one; no stop token.
      scores: one a token where `logprobs` was asked for; else empty.
    """

    ids: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took.

    Attributes:
      prompt_tokens: of the prompt.
      cached_tokens: those of them whose state was at hand.
      completion_tokens: of the answer, those that count.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class End:
    """The last event of every request.

    Attributes:
      reason: why.
      usage: tokens.
      message: one line for "timeout" and "error"; otherwise empty.
    """

    reason: Reason
    usage: Usage
    message: str = ""


Event = PromptScores | Tokens | End


@dataclass(frozen=True)
class Limits:
    """What an engine may hold and how long it may take.

    Raises:
      ConfigError: a number outside its range.
    """

    slots: Count = 64
    """Requests that run at once, each in a row of the batch."""
    queue: CountOrZero = 256
    """Requests that may wait for a slot."""
    max_length: Count | None = None
    """Most tokens of a request, its prompt, session and answer; attention models hold room for
    as many in every slot. None: no limit, and for attention 2048."""
    steps: Count | None = None
    """Tokens that one call decodes a row; None: 8 on a GPU, 1 elsewhere."""
    batch_sizes: tuple[Count, ...] | None = None
    """Rows that decoding is compiled for. None: powers of 4 up to `slots`, for attention `slots`
    alone. One size: a request's tokens are the same in any company, to the last bit."""
    few_row_kernels: bool = False
    """On a GPU, decode few packed rows by the kernels that are fastest for them. Their last bits
    are others, so that a request's tokens then depend on how many run beside it."""
    prefix_cache_bytes: Annotated[int, Range(0)] = 2**30
    """Memory of the device for the states after prompts; 0: none are kept."""
    session_bytes: Annotated[int, Range(0)] = 2**32
    """Memory of the host for named sessions."""
    time_limit_s: AboveZero = 600.0
    """Most seconds of a request, in the queue and running."""

    def __post_init__(self) -> None:
        check_numbers(self)

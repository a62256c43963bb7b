"""Answers as OpenAI's JSON: whole ones, and the chunks of a stream."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.serve.answers import Piece, Scored
from mmfree_jax.serve.requests import TokenScore, Usage

_LEAST = -9999.0  # JSON has no infinity; OpenAI writes this for what has no chance


@dataclass
class Choice:
    """A whole answer, put together from its pieces."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    finish: str | None = None
    usage: Usage | None = None

    def add(self, piece: Piece) -> None:
        """Appends a piece."""
        self.text += piece.text
        self.scored += piece.scored
        if piece.finish is not None:
            self.finish, self.usage = piece.finish, piece.usage


def total_usage(usages: Sequence[Usage | None], prompts: int) -> dict[str, Any]:
    """The `usage` of a response.

    Args:
      usages: of its choices, those of one prompt side by side.
      prompts: how many there are; a prompt counts once, whatever the number of its samples.
    """
    known = [usage for usage in usages if usage is not None]
    firsts = known[:: max(1, len(known) // max(1, prompts))]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    completion = sum(usage.completion_tokens for usage in known)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


@dataclass(frozen=True)
class Form:
    """How the responses to one request are written.

    Attributes:
      model: its name.
      tokenizer: of the model.
      is_chat: as chat completions; False: as completions.
      has_scores: whether logprobs were asked for.
      prompts: of the request; a chat has one.
      id: of the response.
      created: seconds since the epoch.
    """

    model: str
    tokenizer: Tokenizer
    is_chat: bool
    has_scores: bool
    prompts: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A response that is not streamed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        usage = total_usage([choice.usage for choice in choices], self.prompts)
        return self._head(kind) | {
            "choices": [
                self._text(choice.text, "message")
                | self._choice(index, choice.scored, choice.finish)
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """What begins a choice's stream: of a chat, who speaks."""
        if not self.is_chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"delta": delta} | self._choice(index, (), None)])

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        text = self._text(piece.text, "delta")
        return self._chunk([text | self._choice(index, piece.scored, piece.finish)])

    def usage_chunk(self, usages: Sequence[Usage | None]) -> dict[str, Any]:
        """The last chunk of a stream whose usage was asked for."""
        return self._chunk([]) | {"usage": total_usage(usages, self.prompts)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": choices}

    def _text(self, text: str, name: str) -> dict[str, Any]:
        if not self.is_chat:
            return {"text": text}
        if name == "delta":
            return {"delta": {"content": text} if text else {}}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _choice(self, index: int, scored: Iterable[Scored], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self.has_scores:
            write = self._chat_logprobs if self.is_chat else self._logprobs
            logprobs = write(list(scored))
        return {"index": index, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        return {
            "tokens": [token_text(self.tokenizer, s.token) for s in scored],
            "token_logprobs": [
                None if s.score is None else _finite(s.score.logprob) for s in scored
            ],
            "top_logprobs": [
                None if s.score is None else self._likeliest(s.token, s.score) for s in scored
            ],
            "text_offset": [s.offset for s in scored],
        }

    def _likeliest(self, token: int, score: TokenScore) -> dict[str, float]:
        """The likeliest tokens by their texts, and the one that was taken."""
        found: dict[str, float] = {}
        for other, logprob in (*score.top, (token, score.logprob)):
            # Two tokens of one text: the likelier stands for both.
            found.setdefault(token_text(self.tokenizer, other), _finite(logprob))
        return found

    def _chat_logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        content = []
        for s in scored:
            assert s.score is not None  # a chat's prompt is not scored
            top = [self._entry(token, logprob) for token, logprob in s.score.top]
            content.append(self._entry(s.token, s.score.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self.tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""One token as text; of bytes that are no UTF-8 as OpenAI spells them, "bytes:\xe2"."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)

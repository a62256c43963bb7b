"""From text to text: prompts through a tokenizer, answers streamed as whole characters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.infer.api import FinishReason, generate
from mmfree_jax.infer.checks import check_options, check_prompts, rows_of
from mmfree_jax.infer.decode import Session
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig

_REPLACEMENT = "\ufffd"
# A character is at most four bytes, so at most three tokens can be waiting for its last one.
_MOST_PENDING = 3
# Tokens decoded again with the new ones: a tokenizer may render a token by its neighbours.
_CONTEXT = 8

OnText = Callable[[int, str], object]


class Tokenizer(Protocol):
    """What is asked of a tokenizer here; `mmfree_jax.data.tokenizer` has these."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text, without start or end tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with U+FFFD for what is not valid UTF-8."""
        ...


def _stable(text: str) -> str:
    """`text` without the replacement characters at its end that may yet become a character."""
    end = len(text)
    while end > max(0, len(text) - _MOST_PENDING) and text[end - 1] == _REPLACEMENT:
        end -= 1
    return text[:end]


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not whole yet.

    What `push` and `flush` return adds up to the text of all tokens after the context's.

    Example:
      >>> from mmfree_jax.data import ByteTokenizer
      >>> from mmfree_jax.infer import TextStream
      >>> stream = TextStream(ByteTokenizer())
      >>> [stream.push([token]) for token in "né".encode()]
      ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)[-_CONTEXT:]
        self._read = len(self._window)
        self._shown = len(_stable(tokenizer.decode(self._window))) if self._window else 0

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that they complete."""
        self._window += tokens
        return self._advance(final=False)

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        text = self._tokenizer.decode(self._window)
        whole = text if final else _stable(text)
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if whole == text and len(self._window) > 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._shown = len(self._tokenizer.decode(self._window))
        return new


@dataclass(frozen=True)
class TextOutput:
    """What `generate_text` returns.

    Attributes:
      texts: the answers, without their prompts and without the string that ended them.
      tokens: the answers' token ids.
      finish_reasons: "length", "stop_id" or "stop", for each prompt.
      session: after the tokens; give it to `generate_text` to go on.
    """

    texts: list[str]
    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    session: Session


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands for nothing: the start-of-text token, else the end-of-text, else a newline."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return [token]
    return list(tokenizer.encode("\n"))


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, first: bool = True) -> list[int]:
    """A prompt's ids, behind the start-of-text token if the tokenizer has one.

    Args:
      tokenizer: of the model.
      prompt: may be empty.
      first: False where it continues an earlier text.
    """
    ids = list(tokenizer.encode(prompt)) if prompt else []
    if not first:
        return ids
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    return ids or start_tokens(tokenizer)


class AnswerText:
    """One answer as it comes; a string that ends it is no part of it, and none is given in part.

    Attributes:
      text: given out so far.
      stopped: whether a stop string has ended it.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, context)
        self._stop = stop
        self._pending = ""
        self.text = ""
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters that have come, with those that are held back."""
        return len(self.text) + len(self._pending)

    def push(self, *tokens: int) -> str:
        """Adds tokens; returns the text that may be given out."""
        self._pending += self._stream.push(tokens)
        return self._release(final=False)

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        if self.stopped:
            return ""
        self._pending += self._stream.flush()
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        found = [i for i in (self._pending.find(s) for s in self._stop) if i >= 0]
        if found:
            new, self._pending, self.stopped = self._pending[: min(found)], "", True
        else:
            held = 0 if final else self._possible_start()
            cut = len(self._pending) - held
            new, self._pending = self._pending[:cut], self._pending[cut:]
        self.text += new
        return new

    def _possible_start(self) -> int:
        """Characters at the end that may be the start of a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:n]):
                    longest = n
                    break
        return longest


def generate_text(
    model: LanguageModel,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    stop: str | Sequence[str] = (),
    stop_at_end: bool = True,
    on_text: OnText | None = None,
    session: Session | None = None,
    **options: Any,
) -> TextOutput:
    """Continues each prompt with text.

    Args:
      model: the model.
      params: as `generate` takes them.
      tokenizer: of the model.
      prompts: texts, or token ids.
      stop: strings that end an answer, or one; they are not part of it, but they are read, so that
        the session goes on behind them.
      stop_at_end: also end an answer at the tokenizer's end-of-text token.
      on_text: called with (row, new text) as whole characters are generated.
      session: from an earlier call; prompts are appended to it.
      options: of `generate`: max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, seed, streams, stop_ids.

    Raises:
      DataError: a prompt without tokens, or a token id that the model does not have.
      ConfigError: an empty stop string, or an option that does not fit.
    """
    stop = [stop] if isinstance(stop, str) else list(stop or ())
    for text in stop:
        if not isinstance(text, str) or not text:
            raise ConfigError(f"stop holds {text!r}: give texts of at least one character")
    ids = [
        encode_prompt(tokenizer, p, first=session is None) if isinstance(p, str) else p
        for p in rows_of(prompts)
    ]
    ids = check_prompts(model.config, ids, session)  # what follows reads the texts of the ids
    rows = [AnswerText(tokenizer, prompt, stop) for prompt in ids]
    stop_ids = check_options(model.config, 0, options.pop("stop_ids", ()))
    if stop_at_end and tokenizer.eos_id is not None:
        stop_ids.append(tokenizer.eos_id)

    def on_tokens(index: int, tokens: list[int]) -> int | None:
        row = rows[index]
        text, keep = "", None
        for count, token in enumerate(tokens, 1):
            text += row.push(token)
            if row.stopped:
                keep = count
                break
        if on_text is not None and text:
            on_text(index, text)
        return keep

    output = generate(
        model,
        params,
        ids,
        stop_ids=stop_ids,
        on_tokens=on_tokens if stop or on_text is not None else None,
        session=session,
        **options,
    )
    for index, row in enumerate(rows):
        if not stop and on_text is None:
            for token in output.tokens[index]:
                row.push(token)
        if (rest := row.flush()) and on_text is not None:
            on_text(index, rest)
    return TextOutput([r.text for r in rows], output.tokens, output.finish_reasons, output.session)


def sample_text(
    model: LanguageModel,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
) -> str:
    """The prompt and its continuation, as one text. An empty prompt starts a new document."""
    output = generate_text(
        model,
        params,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return prompt + output.texts[0]


def check_tokenizer(config: ModelConfig, tokenizer: Any) -> None:
    """Refuses a tokenizer that makes ids which the model does not have.

    Raises:
      DataError: its vocabulary is larger than the model's.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )

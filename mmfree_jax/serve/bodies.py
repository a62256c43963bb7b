"""The bodies of `/v1/completions`, `/v1/chat/completions` and others: fields, ranges, defaults.

Nothing here imports JAX.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from mmfree_jax.ranges import Range
from mmfree_jax.serve.fields import (
    flag,
    list_of,
    number,
    object_of,
    one_of,
    read_object,
    text,
    whole,
)
from mmfree_jax.serve.request_errors import RequestError, bad_field
from mmfree_jax.serve.requests import MOST_BIASES, MOST_LOGPROBS, MOST_STOP_IDS

MOST_CHOICES = 128
MOST_STOPS = 4
LARGEST_ID = 2**31 - 1
MOST_COUNT = 2**31 - 1
_LONGEST_STOP = 1000  # characters
_MOST_LIST = 2**24
_NO_TOOLS = "this server calls no tools"
_NO_AUDIO = "this model hears and speaks nothing"

IGNORED = frozenset(
    (
        "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
    )
)  # fmt: skip
"""Fields about the client or OpenAI's own service, which change no answer."""


@dataclass(frozen=True)
class StreamOptions:
    """`stream_options`."""

    include_usage: Annotated[bool, flag] = False
    include_obfuscation: Annotated[bool, flag] = False  # which is OpenAI's, and does nothing here


def _stops(value: Any, name: str) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > MOST_STOPS:
        raise bad_field(name, value, f"give a string, or a list of at most {MOST_STOPS}")
    for stop in given:
        if not isinstance(stop, str) or not 1 <= len(stop) <= _LONGEST_STOP:
            way_out = f"each stop is a string of 1 to {_LONGEST_STOP} characters"
            raise bad_field(name, stop, way_out)
    return tuple(dict.fromkeys(given))


def _biases(value: Any, name: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise bad_field(name, value, f"give an object of at most {MOST_BIASES} token ids")
    read = number(Range(-100, 100))
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise bad_field(name, key, "each key is a token id")
        token = int(key)
        if token in biases:
            raise bad_field(name, key, f"token id {token} has a bias already: give each once")
        biases[token] = read(bias, f"{name}.{key}")
    return tuple(biases.items())


def _top_k(value: Any, name: str) -> int:
    # Programs that know vLLM send -1 for all.
    return max(0, whole(-1, MOST_COUNT)(value, name))


def _prompt(value: Any, name: str) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each a text or token ids."""
    way_out = "give a string, a list of strings, token ids or a list of lists of them"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise bad_field(name, value, way_out)
    if all(isinstance(part, str) for part in value):
        return tuple(value)
    ids = list_of(whole(0, LARGEST_ID), most=_MOST_LIST, what="token ids")
    if all(isinstance(part, list) for part in value):
        for i, part in enumerate(value):
            if not part:
                raise bad_field(f"{name}[{i}]", part, "give at least one token id")
        return tuple(ids(part, f"{name}[{i}]") for i, part in enumerate(value))
    if any(isinstance(part, (str, list, dict)) for part in value):
        raise bad_field(name, value, way_out)
    return (ids(value, name),)


@dataclass(frozen=True)
class Choosing:
    """What both kinds of completion are asked alike."""

    model: Annotated[str, text]
    n: Annotated[int, whole(1, MOST_CHOICES)] = 1
    temperature: Annotated[float, number(Range(0, 2))] = 1.0
    top_p: Annotated[float, number(Range(0, 1))] = 1.0
    top_k: Annotated[int, _top_k] = 0
    min_p: Annotated[float, number(Range(0, 1))] = 0.0
    presence_penalty: Annotated[float, number(Range(-2, 2))] = 0.0
    frequency_penalty: Annotated[float, number(Range(-2, 2))] = 0.0
    repetition_penalty: Annotated[float, number(Range(0, 100, open_low=True))] = 1.0
    logit_bias: Annotated[tuple[tuple[int, float], ...], _biases] = ()
    seed: Annotated[int | None, whole(0, 2**32 - 1)] = None
    stop: Annotated[tuple[str, ...], _stops] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], list_of(whole(0, LARGEST_ID), most=MOST_STOP_IDS - 8, what="token ids")
    ] = ()
    ignore_eos: Annotated[bool, flag] = False
    max_tokens: Annotated[int | None, whole(0, MOST_COUNT)] = None
    stream: Annotated[bool, flag] = False
    stream_options: Annotated[StreamOptions | None, object_of(StreamOptions)] = None

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is given without stream: set stream to true, or leave it out",
                param="stream_options",
            )


@dataclass(frozen=True)
class CompletionBody(Choosing):
    """`/v1/completions`, with sessions beside OpenAI's fields."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...] | None, _prompt] = None
    echo: Annotated[bool, flag] = False
    logprobs: Annotated[int | None, whole(0, MOST_LOGPROBS)] = None
    best_of: Annotated[int | None, whole(1, MOST_CHOICES)] = None
    session: Annotated[str | None, text] = None
    save_as: Annotated[str | None, text] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of is not None and self.best_of != self.n:
            raise bad_field(
                "best_of", self.best_of, f"answers are not ranked here: set it to n, {self.n}"
            )
        if self.save_as is not None and self.n * len(self.prompt or ("",)) > 1:
            raise bad_field("save_as", self.save_as, "a session holds one answer: ask for one")
        if self.echo and self.session is not None:
            raise RequestError(
                "echo is set with session: what a session has read is not kept, leave out one",
                param="echo",
            )


COMPLETION_REFUSED = {"suffix": "this model writes at the end of a text only"}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `content` is text."""

    role: str
    content: str
    name: str | None = None

    def fields(self) -> dict[str, str]:
        """As templates read it."""
        found = {"role": self.role, "content": self.content}
        return found if self.name is None else found | {"name": self.name}


@dataclass(frozen=True)
class _Part:
    type: Annotated[str, one_of("text")]
    text: Annotated[str, text]


@dataclass(frozen=True)
class _RefusalPart:
    type: Annotated[str, one_of("text", "refusal")]
    refusal: Annotated[str, text]


@dataclass(frozen=True)
class _GivenMessage:
    role: Annotated[str, one_of("system", "developer", "user", "assistant")]
    content: Annotated[str | None, lambda value, name: _content(value, name)] = None
    name: Annotated[str | None, text] = None


@dataclass(frozen=True)
class _GivenAnswer(_GivenMessage):
    content: Annotated[str | None, lambda value, name: _content(value, name, ("refusal",))] = None
    refusal: Annotated[str | None, text] = None


_PART_IGNORED = frozenset(("annotations", "prompt_cache_breakpoint"))


def _content(value: Any, name: str, others: tuple[str, ...] = ()) -> str:
    """Text, or parts of text, which are put together with a line end between them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad_field(name, value, "give a string, or a list of parts of type text")
    texts = []
    for i, part in enumerate(value):
        place, kind = f"{name}[{i}]", part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str):  # other kinds have fields of their own
            one_of("text", *others)(kind, f"{place}.type")
        if kind == "refusal":
            texts.append(read_object(_RefusalPart, part, name=place).refusal)
        else:
            texts.append(read_object(_Part, part, name=place, ignored=_PART_IGNORED).text)
    return "\n".join(texts)


def _message(given: Any, name: str) -> Message:
    """A turn; an answer may be empty (`null`), as clients hand it back, or a refusal."""
    role = given.get("role") if isinstance(given, dict) else None
    if role in ("tool", "function"):
        raise bad_field(f"{name}.role", role, _NO_TOOLS)
    if role != "assistant":
        read = read_object(_GivenMessage, given, name=name, refused=_MESSAGE_REFUSED)
        if read.content is None:
            raise RequestError(
                f"{name}.content is missing: give it, only an answer may be without",
                param=f"{name}.content",
                code="missing_required_parameter",
            )
        return Message("system" if role == "developer" else read.role, read.content, read.name)
    answer = read_object(
        _GivenAnswer,
        given,
        name=name,
        ignored=frozenset(("annotations",)),
        refused=_MESSAGE_REFUSED,
        idle={"tool_calls": ([],)},
    )
    if answer.content and answer.refusal:
        raise RequestError(
            f"{name} has both content and refusal: an answer is one of them",
            param=f"{name}.refusal",
            code="invalid_value",
        )
    return Message(answer.role, answer.content or answer.refusal or "", answer.name)


_MESSAGE_REFUSED = {
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "audio": _NO_AUDIO,
}


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise bad_field(name, value, "give a list of at least one message")
    return tuple(_message(given, f"{name}[{i}]") for i, given in enumerate(value))


@dataclass(frozen=True)
class _ResponseFormat:
    type: Annotated[str, one_of("text")]


@dataclass(frozen=True)
class ChatBody(Choosing):
    """`/v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], _messages] = ()
    max_completion_tokens: Annotated[int | None, whole(1, MOST_COUNT)] = None
    logprobs: Annotated[bool, flag] = False
    top_logprobs: Annotated[int | None, whole(0, MOST_LOGPROBS)] = None
    response_format: Annotated[_ResponseFormat | None, object_of(_ResponseFormat)] = None
    modalities: Annotated[tuple[str, ...], list_of(one_of("text"), most=1, what="kinds: text")] = (
        "text",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.messages:
            raise RequestError(
                "messages is missing: give a list of at least one message",
                param="messages",
                code="missing_required_parameter",
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError(
                "max_tokens and max_completion_tokens are both given: give one", param="max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs is given without logprobs: set logprobs to true",
                param="top_logprobs",
            )


CHAT_REFUSED = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "parallel_tool_calls": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "audio": _NO_AUDIO,
    "moderation": "this server moderates nothing",
    "prediction": "this model takes no predicted text",
    "reasoning_effort": "this model answers without reasoning first",
    "verbosity": "this model has no such setting, max_tokens bounds its answers",
    "web_search_options": "this server searches nothing",
}
_CHAT_IDLE = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""What clients send that hold no tools, and OpenAI's own defaults."""


def read_completion(body: Any) -> CompletionBody:
    """The body of `/v1/completions`.

    Raises:
      RequestError: a field is missing, unknown, refused or wrong.
    """
    idle = {"suffix": ("",)}
    return read_object(CompletionBody, body, ignored=IGNORED, refused=COMPLETION_REFUSED, idle=idle)


def read_chat(body: Any) -> ChatBody:
    """The body of `/v1/chat/completions`.

    Raises:
      RequestError: a field is missing, unknown, refused or wrong.
    """
    return read_object(ChatBody, body, ignored=IGNORED, refused=CHAT_REFUSED, idle=_CHAT_IDLE)


@dataclass(frozen=True)
class SessionBody:
    """`POST /v1/sessions`: reads a prompt and keeps the state behind it."""

    name: Annotated[str, text]
    prompt: Annotated[tuple[str | tuple[int, ...], ...] | None, _prompt] = None
    session: Annotated[str | None, text] = None

    def __post_init__(self) -> None:
        if self.prompt is not None and len(self.prompt) > 1:
            raise RequestError("prompt holds several: a session reads one", param="prompt")


@dataclass(frozen=True)
class ForkBody:
    """`POST /v1/sessions/NAME/fork`."""

    name: Annotated[str, text]


@dataclass(frozen=True)
class TokenizeBody:
    """`POST /tokenize`, as vLLM's server has it."""

    prompt: Annotated[str, text]
    add_special_tokens: Annotated[bool, flag] = True
    model: Annotated[str | None, text] = None


@dataclass(frozen=True)
class DetokenizeBody:
    """`POST /detokenize`, as vLLM's server has it."""

    tokens: Annotated[
        tuple[int, ...], list_of(whole(0, LARGEST_ID), most=_MOST_LIST, what="token ids")
    ]
    model: Annotated[str | None, text] = None

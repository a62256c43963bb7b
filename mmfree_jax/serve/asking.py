"""From a request's body to the engine: prompts as token ids, one engine request a choice."""

import math
import secrets
from collections.abc import Sequence

from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.infer.text import encode_prompt
from mmfree_jax.serve.answers import Answer
from mmfree_jax.serve.bodies import ChatBody, Choosing, CompletionBody, SessionBody
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.request_errors import RequestError, bad_field
from mmfree_jax.serve.requests import (
    EngineClosed,
    QueueFull,
    Request,
    RowSampling,
    SessionsFull,
    UnknownSession,
    check_session_name,
)
from mmfree_jax.serve.service import Service

_COMPLETION_TOKENS = 16  # OpenAI's default for max_tokens of /v1/completions
_LEAST_TOP_P = 1e-6  # for 0, which OpenAI allows: the likeliest token alone

Prompt = str | tuple[int, ...]


def ask_completion(service: Service, body: CompletionBody) -> list[Answer]:
    """Submits a completion: an answer for each prompt and sample, in OpenAI's order.

    Raises:
      RequestError: the model's name, a prompt or a number does not fit, or no place is free.
    """
    service.check_model(body.model)
    prompts = body.prompt or ("",)
    _check_choices(service, len(prompts) * body.n)
    given = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    max_tokens = _max_tokens(service, "max_tokens", given)
    scores_prompt = body.echo and body.logprobs is not None
    # One token behind an echoed prompt is what harnesses ask for that score the prompt. They drop
    # the last entry, so that there must be one, whichever token it is.
    ends = () if scores_prompt and max_tokens == 1 else _ends(service, body)
    sampling, seed = _sampling(body), _seed(body)
    requests, texts = [], []
    for prompt in prompts:
        ids = _prompt_ids(service, prompt, continues=body.session is not None)
        text = ""
        if body.echo:
            text = prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
        for sample in range(body.n):
            request = _request(
                ids,
                max_tokens,
                sampling,
                seed=seed,
                sample=sample,
                stop_ids=ends,
                logprobs=body.logprobs,
                echo_logprobs=scores_prompt,
                session=body.session,
                save_as=body.save_as,
            )
            requests.append(request)
            texts.append(text)
    return [
        Answer(handle, service.tokenizer, body.stop, body.echo, text)
        for handle, text in zip(_submit(service, requests), texts, strict=True)
    ]


def ask_chat(service: Service, body: ChatBody) -> list[Answer]:
    """Submits a chat completion: an answer for each sample.

    Raises:
      RequestError: as `ask_completion`, or the chat template refuses the messages.
    """
    service.check_model(body.model)
    _check_choices(service, body.n)
    ids = tuple(service.chat.prompt(body.messages))
    _check_length(service, len(ids), "messages")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if given is None:
        given = service.limits.max_tokens
        if service.engine.max_length is not None:
            given = max(1, min(given, service.engine.max_length - len(ids)))
    max_tokens = _max_tokens(service, name, given)
    seed, sampling = _seed(body), _sampling(body)
    requests = [
        _request(
            ids,
            max_tokens,
            sampling,
            seed=seed,
            sample=sample,
            stop_ids=_ends(service, body),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        for sample in range(body.n)
    ]
    stops = (*body.stop, *service.chat.stops)
    return [Answer(handle, service.tokenizer, stops) for handle in _submit(service, requests)]


def ask_session(service: Service, body: SessionBody) -> Handle:
    """Submits the reading of a prompt whose state is kept.

    Raises:
      RequestError: as `ask_completion`.
    """
    prompt = body.prompt[0] if body.prompt else ""
    ids = _prompt_ids(service, prompt, continues=body.session is not None)
    try:
        check_session_name(body.name, "name")
    except ConfigError as e:
        raise engine_error(e) from e
    request = _request(ids, 0, RowSampling(), session=body.session, save_as=body.name)
    return _submit(service, [request])[0]


def engine_error(error: MMFreeError) -> RequestError:
    """What a client is told of an error that the engine raised."""
    message = str(error).replace("stop_ids", "stop_token_ids")  # as clients know them
    if isinstance(error, QueueFull):
        retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return RequestError(message, status=429, code="queue_full", headers=retry)
    if isinstance(error, EngineClosed):
        retry = {"Retry-After": "5"}
        return RequestError(message, status=503, code="engine_closed", headers=retry)
    if isinstance(error, SessionsFull):
        return RequestError(message, param="save_as", code="sessions_full")
    if isinstance(error, UnknownSession):
        return RequestError(message, status=404, param="session", code="session_not_found")
    param = message.partition(" ")[0]  # messages begin with the field that they are about
    return RequestError(message, param=param if param.isidentifier() else None)


def _prompt_ids(service: Service, prompt: Prompt, *, continues: bool) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = tuple(encode_prompt(service.tokenizer, prompt, first=not continues))
    else:
        ids = prompt
    _check_length(service, len(ids), "prompt")
    return ids


def _check_length(service: Service, tokens: int, param: str) -> None:
    most = service.limits.prompt_tokens
    if tokens > most:
        raise RequestError(
            f"{param} has {tokens} tokens: this server reads at most {most}, shorten it",
            param=param,
            code="context_length_exceeded",
        )


def _check_choices(service: Service, count: int) -> None:
    most = service.limits.choices
    if count > most:
        raise RequestError(
            f"prompt and n ask for {count} answers: this server gives at most {most} at once",
            param="n",
            code="invalid_value",
        )


def _max_tokens(service: Service, name: str, value: int) -> int:
    if value > service.limits.max_tokens:
        raise bad_field(name, value, f"this server gives at most {service.limits.max_tokens}")
    return value


def _ends(service: Service, body: Choosing) -> tuple[int, ...]:
    own = () if body.ignore_eos else service.end_ids
    return tuple(dict.fromkeys((*own, *body.stop_token_ids)))


def _seed(body: Choosing) -> int:
    return secrets.randbits(32) if body.seed is None else body.seed


def _sampling(body: Choosing) -> RowSampling:
    return RowSampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=max(body.top_p, _LEAST_TOP_P),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
    )


def _request(
    ids: tuple[int, ...], max_tokens: int, sampling: RowSampling, **others: object
) -> Request:
    try:
        return Request(ids, max_tokens, sampling, **others)  # type: ignore[arg-type]
    except ConfigError as e:
        raise engine_error(e) from e


def _submit(service: Service, requests: Sequence[Request]) -> list[Handle]:
    """Submits all requests or none."""
    handles: list[Handle] = []
    try:
        for request in requests:
            handles.append(service.engine.submit(request))
    except MMFreeError as e:  # of the engine: a full queue, an unknown session, a token id
        for handle in handles:
            handle.cancel()
        raise engine_error(e) from e
    return handles

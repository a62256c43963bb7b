"""The endpoints: a function for each path, from a request to its response."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmfree_jax.errors import MMFreeError
from mmfree_jax.serve.answers import Answer
from mmfree_jax.serve.asking import ask_chat, ask_completion, ask_session, engine_error
from mmfree_jax.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ForkBody,
    SessionBody,
    TokenizeBody,
    read_chat,
    read_completion,
)
from mmfree_jax.serve.delivery import Delivery, while_connected
from mmfree_jax.serve.fields import read_object
from mmfree_jax.serve.json_body import (
    check_content_encoding,
    check_content_type,
    parse_body,
    read_body,
)
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.serve.requests import End
from mmfree_jax.serve.responses import Form, token_text
from mmfree_jax.serve.service import Service
from mmfree_jax.serve.session_store import SessionInfo

_QUICK = 2**15  # bytes of a body that is read at once; a larger one is in a thread of its own
_T = TypeVar("_T")


def service_of(request: Request) -> Service:
    """What the application serves."""
    return request.app.state.service


async def _read(request: Request, reader: Callable[[Any], _T]) -> _T:
    """The body of a request as a dataclass.

    Raises:
      RequestError: it is too large, late, no JSON, or a field is wrong.
    """
    service = service_of(request)
    check_content_type(request.headers.get("content-type"))
    check_content_encoding(request.headers.get("content-encoding"))
    data = await read_body(
        request.receive,
        most_bytes=service.limits.body_bytes,
        seconds=service.limits.body_seconds,
        declared=request.headers.get("content-length"),
    )
    if service.log_requests:
        request.state.body = data.decode("utf-8", "backslashreplace")
    return await _in_turn(len(data), lambda: reader(parse_body(data)))


async def _in_turn(size: int, work: Callable[[], _T]) -> _T:
    """Work that grows with a body: much of it beside the loop, which others wait for."""
    return work() if size <= _QUICK else await asyncio.to_thread(work)


def _length(request: Request) -> int:
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdigit() else _QUICK + 1


async def completions(request: Request) -> Response:
    """`POST /v1/completions`."""
    service = service_of(request)
    body: CompletionBody = await _read(request, read_completion)
    answers = await _in_turn(_length(request), lambda: ask_completion(service, body))
    prompts = len(body.prompt or ("",))
    form = Form(service.name, service.tokenizer, False, body.logprobs is not None, prompts)
    return _deliver(service, body, answers, form)


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    service = service_of(request)
    body: ChatBody = await _read(request, read_chat)
    answers = await _in_turn(_length(request), lambda: ask_chat(service, body))
    form = Form(service.name, service.tokenizer, True, body.logprobs, 1)
    return _deliver(service, body, answers, form)


def _deliver(
    service: Service, body: CompletionBody | ChatBody, answers: list[Answer], form: Form
) -> Response:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return Delivery(answers, form, service.metrics, stream=body.stream, with_usage=with_usage)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mmfree",
        "has_chat_template": service.chat.source is not None,
        "max_length": service.engine.max_length,
    }


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    return JSONResponse({"object": "list", "data": [_model(service_of(request))]})


async def model(request: Request) -> Response:
    """`GET /v1/models/NAME`."""
    service = service_of(request)
    service.check_model(request.path_params["name"])
    return JSONResponse(_model(service))


async def health(request: Request) -> Response:
    """`GET /health`: 200 while requests are taken, 503 otherwise."""
    service = service_of(request)
    if service.is_stopping or not service.engine.healthy:
        why = "stopping" if service.is_stopping else "failed"
        return JSONResponse({"status": why}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    text = service_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _session(info: SessionInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "session",
        "tokens": info.tokens,
        "bytes": info.bytes,
        "saved_at": int(info.saved_at),
    }


def _find(service: Service, name: str) -> SessionInfo:
    found = next((info for info in service.engine.sessions() if info.name == name), None)
    if found is None:
        raise RequestError(
            f"session is {name[:200]!r}: there is none of that name",
            status=404,
            param="session",
            code="session_not_found",
        )
    return found


async def sessions(request: Request) -> Response:
    """`GET /v1/sessions`."""
    found = service_of(request).engine.sessions()
    return JSONResponse({"object": "list", "data": [_session(info) for info in found]})


async def save_session(request: Request) -> Response:
    """`POST /v1/sessions`: reads a prompt and keeps the state behind it under a name."""
    service = service_of(request)
    body = await _read(request, lambda value: read_object(SessionBody, value))
    handle = await _in_turn(_length(request), lambda: ask_session(service, body))

    async def end() -> End | None:
        async for event in handle:
            if isinstance(event, End):
                return event
        return None

    try:
        ended = await while_connected(request.receive, end())
    finally:
        handle.cancel()
    if ended is None or ended.reason not in ("length", "stop"):
        message = "" if ended is None else ended.message
        raise RequestError(message or "the server stops: try again later", status=503)
    return JSONResponse(_session(_find(service, body.name)), 201)


async def session(request: Request) -> Response:
    """`GET` or `DELETE /v1/sessions/NAME`."""
    service, name = service_of(request), request.path_params["name"]
    info = _find(service, name)
    if request.method != "DELETE":
        return JSONResponse(_session(info))
    await _of_engine(lambda: service.engine.delete_session(name))
    return JSONResponse({"id": name, "object": "session", "deleted": True})


async def fork_session(request: Request) -> Response:
    """`POST /v1/sessions/NAME/fork`: a second name for the state."""
    service, name = service_of(request), request.path_params["name"]
    body = await _read(request, lambda value: read_object(ForkBody, value))
    info = await _of_engine(lambda: service.engine.fork_session(name, body.name))
    return JSONResponse(_session(info), 201)


async def restore_session(request: Request) -> Response:
    """`POST /v1/sessions/NAME/restore`: as its file has it."""
    service, name = service_of(request), request.path_params["name"]
    info = await _of_engine(lambda: service.engine.restore_session(name))
    return JSONResponse(_session(info))


async def _of_engine(work: Callable[[], _T]) -> _T:
    """What the engine does with files, beside the loop."""
    try:
        return await asyncio.to_thread(work)
    except MMFreeError as e:
        raise engine_error(e) from e


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: a text's token ids.

    The name of a special token, alone, is that token, which is how lm-eval asks for its id; in a
    longer text it is text.
    """
    service = service_of(request)
    body = await _read(request, lambda value: read_object(TokenizeBody, value))
    tokenizer = service.tokenizer
    if body.prompt in tokenizer.special_tokens:
        ids = [tokenizer.special_tokens[body.prompt]]
    else:
        ids = await _in_turn(len(body.prompt), lambda: list(tokenizer.encode(body.prompt)))
        if body.add_special_tokens and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id, *ids]
    return JSONResponse({"count": len(ids), "tokens": ids, "max_model_len": None})


async def detokenize(request: Request) -> Response:
    """`POST /detokenize`: the text of token ids."""
    body = await _read(request, lambda value: read_object(DetokenizeBody, value))
    tokenizer = service_of(request).tokenizer
    text = await _in_turn(len(body.tokens), lambda: tokenizer.decode(body.tokens))
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """`GET /tokenizer_info`: the names of special tokens, and the chat template."""
    service = service_of(request)
    names = {"bos_token": service.tokenizer.bos_id, "eos_token": service.tokenizer.eos_id}
    named = {
        key: None if token is None else token_text(service.tokenizer, token)
        for key, token in names.items()
    }
    return JSONResponse(named | {"chat_template": service.chat.source})

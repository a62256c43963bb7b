"""The application: its paths, and who is let in."""

from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mmfree_jax import export
from mmfree_jax.serve import endpoints
from mmfree_jax.serve.delivery import error_response
from mmfree_jax.serve.gate import GONE, Gate
from mmfree_jax.serve.json_body import ClientGone
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.serve.service import Service

_OWN = Path(__file__).parent / "page"
_EXPORTED = Path(export.__file__).parent / "web"
_PAGE = {
    "page.js": _OWN,
    "own.css": _OWN,
    "style.css": _EXPORTED,
    "settings.js": _EXPORTED,
    "kept.js": _EXPORTED,
}
"""Files of the page and where they are: what it shares with the page of an export is there."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """`GET /`: a page that speaks to this server."""
    del request
    return FileResponse(_OWN / "index.html", headers=_HEADERS)


async def page_file(request: Request) -> Response:
    """`GET /page/NAME`: what the page loads."""
    name = request.path_params["name"]
    if name not in _PAGE:
        raise HTTPException(404)
    return FileResponse(_PAGE[name] / name, headers=_HEADERS)


def make_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
) -> ASGIApp:
    """The application of a server.

    Args:
      service: what it serves.
      keys: one of which a request must bring; none: nobody is asked for one.
      allowed_hosts: names by which it may be asked, beside its addresses (see `Gate`).
      allowed_origins: of other sites' pages whose scripts may read its answers.
    """
    e = endpoints
    routes = [
        Route("/", page),
        Route("/page/{name}", page_file),
        Route("/health", e.health),
        Route("/metrics", e.metrics),
        Route("/v1/models", e.models),
        Route("/v1/models/{name:path}", e.model),
        Route("/v1/completions", e.completions, methods=["POST"]),
        Route("/v1/chat/completions", e.chat_completions, methods=["POST"]),
        Route("/v1/sessions", e.sessions),
        Route("/v1/sessions", e.save_session, methods=["POST"]),
        Route("/v1/sessions/{name}", e.session, methods=["GET", "DELETE"]),
        Route("/v1/sessions/{name}/fork", e.fork_session, methods=["POST"]),
        Route("/v1/sessions/{name}/restore", e.restore_session, methods=["POST"]),
        Route("/tokenize", e.tokenize, methods=["POST"]),
        Route("/detokenize", e.detokenize, methods=["POST"]),
        Route("/tokenizer_info", e.tokenizer_info),
    ]
    handlers = {
        RequestError: _refused,
        ClientGone: _gone,
        HTTPException: _no_such_path,
        Exception: _fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    app.state.service = service
    gate = Gate(app, service, keys=keys, allowed_hosts=allowed_hosts)
    if not allowed_origins:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=list(allowed_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _fault(request: Request, error: Exception) -> Response:
    """What a client is told; `Gate` writes to the log where the fault is."""
    return error_response(RequestError("the server made a fault: see its log", status=500))


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    texts = {404: f"there is no {what}: see docs/serving.md", 405: f"{what} is not allowed"}
    message = texts.get(error.status_code, error.detail)
    codes = {404: "not_found", 405: "method_not_allowed"}
    return error_response(
        RequestError(
            message,
            status=error.status_code,
            code=codes.get(error.status_code),
            headers=dict(error.headers or {}),
        )
    )

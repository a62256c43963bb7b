"""Errors that a request is answered with, in OpenAI's form. Nothing here imports JAX."""

from collections.abc import Mapping
from typing import Any

from mmfree_jax.errors import MMFreeError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(MMFreeError):
    """A request that is refused; its message is one line that names field, value and way out.

    Attributes:
      status: HTTP status code, 400 to 599.
      param: the field at fault, for example "messages[2].role"; None: no single one.
      code: what programs tell errors apart by, for example "model_not_found".
      headers: of the answer, for example Retry-After.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON answer."""
        if self.status in _TYPES:
            kind = _TYPES[self.status]
        else:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def bad_field(name: str, value: object, way_out: str) -> RequestError:
    """A 400 for a field, or "" for the body: names it, its value and what to give instead."""
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:60]}... ({len(shown)} characters)"
    message = f"{name or 'the body'} is {shown}: {way_out}"
    return RequestError(message, param=name or None, code="invalid_value")

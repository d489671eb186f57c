"""What goes wrong between a client and the engine, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer with a status other than 200.

    param: the field of the request that it is about. retry_after: seconds after which to come again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status, message, None if retry_after is None else {"Retry-After": str(retry_after)})
        self.param = param


class ErrorBody(BaseModel):
    """OpenAI's error object: message, type, param and code."""

    error: dict[str, str | int | None]


def error_body(error: HTTPException) -> dict[str, Any]:
    """OpenAI's error object."""
    status = error.status_code
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = getattr(error, "param", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": status}}

"""What a client is told when something is wrong: OpenAI's error shape, one sentence, no traces."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minipaged.errors import InvalidRequestError, MinipagedError
from minipaged.serving.async_engine import EngineDiedError, QueueFullError, ShuttingDownError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request that is answered with an error.

    code: a word for programs; None where the status says it all.
    param: the field of the request that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        if self.status >= 500:
            return "server_error"
        return KINDS.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """What the client gets, as the body of the answer or as an event of a stream."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def to_api_error(error: Exception) -> APIError:
    """What to tell a client of an error; of one that is a defect, nothing but that."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InvalidRequestError):
        return APIError(400, str(error))
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.retry_after)}
        return APIError(429, str(error), "queue_full", headers=headers)
    if isinstance(error, ShuttingDownError | EngineDiedError):
        return APIError(503, str(error), "unavailable", headers={"Retry-After": "10"})
    return APIError(500, "the server failed on this request; its log says why")


def install(app: FastAPI) -> None:
    """Answer every error of this application in one shape."""

    @app.exception_handler(APIError)
    @app.exception_handler(MinipagedError)
    @app.exception_handler(Exception)
    async def answer(request: Request, error: Exception) -> JSONResponse:
        return to_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return _describe(error).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"there is nothing at {request.url.path}; the API is at /v1",
            405: f"{request.url.path} does not know the method {request.method}",
        }
        message = messages.get(error.status_code, "the body is no JSON that can be read")
        headers = dict(error.headers) if error.headers else None
        return APIError(error.status_code, message, headers=headers).response()


def _describe(error: RequestValidationError) -> APIError:
    """One sentence about the first field that is wrong."""
    first, *_ = error.errors()
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is no JSON that can be read: {first['ctx']['error']}")
    place = [str(part) for part in first["loc"][1:]]
    if not place:
        return APIError(400, "the body must be a JSON object, sent as application/json")
    field = place[0]
    reasons = [e["msg"] for e in error.errors() if e["loc"][1:2] == first["loc"][1:2]]
    if first["type"] == "extra_forbidden":
        reasons = ["there is no such field"]
    reason = "; or ".join(dict.fromkeys(reasons))
    return APIError(400, f"field {field!r}: {reason}", "invalid_field", field)

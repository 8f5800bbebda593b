"""From an exception to an HTTP answer in OpenAI's error shape, once, for every route."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from twotower.cluster.services.ray_errors import plain_error
from twotower.deployments.completions.status import error_answer
from twotower.deployments.http.answers import ErrorAnswer, ErrorBody
from twotower.deployments.telemetry.errors import ERROR_ANSWERS
from twotower.protos.refusals import retry_after_of
from twotower.towers.errors import InvalidRequestError, shorten

logger = logging.getLogger("ray.serve")

_MOST_OF_A_NAME = 80
# Status, and OpenAI's type and code, of each gRPC status that the service gives.
_HTTP: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error", "permission_denied"),
    grpc.StatusCode.NOT_FOUND: (404, "invalid_request_error", "not_found"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    grpc.StatusCode.ABORTED: (503, "server_error", "lost_too_often"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error", "unavailable"),
    grpc.StatusCode.INTERNAL: (500, "server_error", "internal_error"),
}


class NotFoundError(Exception):
    """Nothing is there under that name; the text is made for clients."""

    def __init__(self, text: str, param: str | None, code: str) -> None:
        super().__init__(text)
        self.param = param
        self.code = code


def answer_of(error: BaseException, request_id: str) -> tuple[int, ErrorAnswer]:
    """Status and body for an error; the text names a field or says what to do, never a place."""
    if isinstance(error, NotFoundError):
        ERROR_ANSWERS.note(grpc.StatusCode.NOT_FOUND.name)
        return 404, _answer(str(error), "invalid_request_error", error.param, error.code)
    code, text = error_answer(error, request_id)
    status, kind, name = _HTTP.get(code, _HTTP[grpc.StatusCode.INTERNAL])
    plain = plain_error(error)
    param = plain.field if isinstance(plain, InvalidRequestError) else None
    return status, _answer(text, kind, param, name)


def error_response(error: BaseException, request_id: str) -> Response:
    """The answer to a request that an error has ended, before anything was sent."""
    status, answer = answer_of(error, request_id)
    headers = {}
    wait = retry_after_of(answer.error.message)
    if wait is not None:
        headers["retry-after"] = str(max(1, round(wait)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(answer.model_dump(), status, headers)


def add_handlers(app: FastAPI) -> None:
    """Makes all answers to faulty requests errors in OpenAI's shape."""

    async def refuse(request: Request, error: Exception) -> Response:
        return error_response(error, request.state.request_id)

    async def refuse_fields(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        ERROR_ANSWERS.note(grpc.StatusCode.INVALID_ARGUMENT.name)
        text, field = _first_fault(error.errors())
        return JSONResponse(_answer(text, "invalid_request_error", field, None).model_dump(), 400)

    async def refuse_http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = _TEXTS.get(error.status_code, str(error.detail))
        answer = _answer(text, "invalid_request_error", None, None)
        return JSONResponse(answer.model_dump(), error.status_code, error.headers)

    app.add_exception_handler(RequestValidationError, refuse_fields)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_exception_handler(Exception, refuse)


_TEXTS = {
    400: "body: expected JSON in UTF-8",
    404: "no such path",
    405: "this path does not take this method",
}


def _answer(message: str, kind: str, param: str | None, code: str | None) -> ErrorAnswer:
    return ErrorAnswer(error=ErrorBody(message=message, type=kind, param=param, code=code))


def _first_fault(errors: Sequence[Any]) -> tuple[str, str | None]:
    """A sentence on the first fault of a body, and its field.

    Of a union pydantic reports each branch under its own name: these are dropped, and the fault
    that lies deepest is taken, which is the branch that was meant.
    """
    if errors[0]["type"] == "json_invalid":
        return f"body: got no JSON ({errors[0]['ctx']['error']}), expected an object", None
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    error = unknown[0] if unknown else max(errors, key=lambda each: len(_path(each["loc"])))
    path = _path(error["loc"])
    field = ".".join(path) if path else "body"
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown field, expected one of the documented ones", field
    if error["type"] == "missing":
        return f"{field}: missing, expected a value", field
    same = [each for each in errors if _path(each["loc"]) == path]
    wanted = " or ".join(dict.fromkeys(each["msg"] for each in same)).replace("Input", "it")
    return f"{field}: got {shorten(error['input'])}, {wanted}", field


def _path(loc: Sequence[Any]) -> list[str]:
    """The names and numbers of a fault's place in the body, without the names of a union's
    branches, which are those of types; of a client's own name its beginning."""
    names = [str(part)[:_MOST_OF_A_NAME] for part in loc[1:]]
    return [name for name in names if name != "str" and "[" not in name]

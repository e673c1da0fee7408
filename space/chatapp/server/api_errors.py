"""Errors of the API in OpenAI's shape, and FastAPI's handlers for them."""

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chatapp.server.fair_queue import Busy

FAILED = "the server failed to answer; its log has the reason"


class ApiError(Exception):
    """An error as OpenAI words it: https://platform.openai.com/docs/guides/error-codes"""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers: dict[str, str] = {}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class BodyTooLarge(ApiError):
    def __init__(self, max_body: int) -> None:
        super().__init__(413, f"a request may have at most {max_body} bytes")


class ClientGone(Exception):
    """The client closed the connection, so nobody reads the answer."""


def as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case Busy():
            busy = ApiError(429, str(error), code="server_busy")
            busy.headers["Retry-After"] = str(error.retry_after)
            return busy
        case ValueError():  # the engine raises it for a conversation that it cannot answer
            return ApiError(400, str(error), "messages")
        case HTTPException():
            return ApiError(error.status_code, error.detail)
        case _:
            return ApiError(500, FAILED)


async def respond(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def respond_to_nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the status that nginx logs for a closed connection


def handle_errors(app: FastAPI, max_body: int) -> None:
    """Give the routes of `app` answers in OpenAI's shape for every error. A mounted app keeps its own handlers."""

    async def respond_too_large(_: Request, error: Exception) -> Response:
        return BodyTooLarge(max_body).response()

    for kind in (ApiError, Busy, ValueError, HTTPException):
        app.add_exception_handler(kind, respond)
    for gone in (ClientGone, ClientDisconnect):
        app.add_exception_handler(gone, respond_to_nobody)
    app.add_exception_handler(413, respond_too_large)  # raised by Starlette's RequestBodyLimitMiddleware
    # For errors of this app itself. Starlette raises them again after the answer: uvicorn then logs them and closes the
    # connection. A failure of the model is an ApiError, which leaves the connection open.
    app.add_exception_handler(Exception, respond)

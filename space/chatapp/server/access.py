"""Who may use the API: an API key, and the web pages of other sites."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from chatapp.server.api_errors import ApiError

KEY = "CHAT_API_KEY"  # the environment variable
API = ("/v1", "/health")


@dataclass(frozen=True)
class Access:
    """`key`: what clients must send ("": nothing). `origins`: sites whose pages may call the API; * stands for any."""

    key: str = ""
    origins: tuple[str, ...] = ()

    async def check_key(self, request: Request) -> None:
        """Raise ApiError unless the request has the key. A dependency of FastAPI."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in constant time: otherwise the time of an answer would tell how much of a key is right.
        right = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if self.key and not (right and scheme.lower() == "bearer"):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )


def checked_key(key: str) -> str:
    """The key of the environment. Raises ValueError, with one line, when no client could send it."""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{KEY} may have only printable ASCII characters, and no space")
    return key


class ApiCors:
    """An ASGI middleware: CORS for the API alone. The page needs no other site."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._api = CORSMiddleware(
            app, origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["Retry-After"]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_api = scope["type"] == "http" and any(
            scope["path"] == path or scope["path"].startswith(f"{path}/") for path in API
        )
        await (self._api if is_api else self._app)(scope, receive, send)


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let the pages of these sites call the API. Without it, browsers refuse them."""
    if origins:
        app.add_middleware(ApiCors, origins=list(origins))

"""What every request passes first: no large bodies, no uploads, and pages that load nothing from other servers.

Starlette's RequestBodyLimitMiddleware counts the bytes of bodies without a declared length. It answers a declared
length that is too large in plain text and ignores the app's handlers. The API's clients expect JSON, so RequestGuard
answers these requests itself.
"""

import logging

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatapp.server.api_errors import ApiError, BodyTooLarge

# Bytes. A model reads a fraction of these, but clients send the whole history of a conversation.
MAX_BODY = 4 << 20
# Gradio keeps uploads on the disk, and this app takes no files.
UPLOADS = "/gradio_api/upload"
GRADIO = "/gradio_api/"
# Browsers obey this header: the page can load nothing from another server.
CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"
log = logging.getLogger("uvicorn.error")


class RequestGuard:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"].startswith(UPLOADS):
            await ApiError(404, "this app takes no uploads").response()(scope, receive, send)
        elif int(Headers(scope=scope).get("content-length", "0")) > MAX_BODY:  # h11 accepts only digits here
            await BodyTooLarge(MAX_BODY).response()(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        # Gradio answers a request that its page never sends with status 500 and a traceback in the log.
        for_gradio = scope["path"].startswith(GRADIO)

        async def send_with_policy(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if for_gradio and message["status"] == 500:
                    message["status"] = 400
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        try:
            await self._app(scope, receive, send_with_policy)
        except Exception as error:
            if not (for_gradio and begun):
                raise
            log.warning("refused a request that the page never sends: %s: %s", scope["path"], error)


def guard(app: FastAPI) -> None:
    """Add both middlewares to `app`; the guard comes first."""
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)
    app.add_middleware(RequestGuard)

"""What every request passes first: no body beyond a limit, no uploads, and pages that load nothing from elsewhere."""

import asyncio
import logging
from typing import Any

import h11
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_BODY = 1 << 20  # bytes: the longest conversation that a model reads has a fraction of it
# Gradio keeps what is uploaded on the disk; nothing here takes a file.
CLOSED = "/gradio_api/upload"
PAGE = "/gradio_api/"
# The browser itself sees to it that the page stays what this process serves.
CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"
SLOWEST_REQUEST = 30  # seconds in which a request, once begun, must have arrived
log = logging.getLogger("uvicorn.error")


class PunctualProtocol(H11Protocol):
    """HTTP whose connections are closed when a request does not arrive: idle ones would take up all places in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # it has arrived
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(SLOWEST_REQUEST, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class TooLarge(Exception):
    pass


class Limits:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, most_body: int = MOST_BODY) -> None:
        self._app = app
        self._most_body = most_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(CLOSED):
            await self._refuse(404, "nothing can be uploaded here", scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self._most_body:
            await self._refuse_body(scope, receive, send)
            return
        received = 0
        begun = False
        # What no page of ours sends, Gradio takes for a fault of its own, and writes a traceback for each.
        of_the_page = scope["path"].startswith(PAGE)

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_body:  # sent in chunks, without a declared length
                raise TooLarge
            return message

        async def send_with_policy(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if of_the_page and message["status"] == 500:
                    message["status"] = 400
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        try:
            await self._app(scope, receive_limited, send_with_policy)
        except TooLarge:
            if begun:
                raise
            await self._refuse_body(scope, receive, send)
        except Exception as error:
            if not (of_the_page and begun):
                raise
            log.warning("the page's parts do not send such a request: %s: %s", scope["path"], error)

    async def _refuse_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._refuse(413, f"a request may have at most {self._most_body} bytes", scope, receive, send)

    async def _refuse(self, status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        await JSONResponse({"error": error}, status)(scope, receive, send)

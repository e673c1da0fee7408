"""What every request passes first: no body beyond a limit, no uploads, and pages that load nothing from elsewhere."""

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY = 1 << 20  # bytes: the longest conversation that a model reads has a fraction of it
# Gradio keeps what is uploaded on the disk; nothing here takes a file.
CLOSED = "/gradio_api/upload"
# The browser itself sees to it that the page stays what this process serves.
CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"


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
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        try:
            await self._app(scope, receive_limited, send_with_policy)
        except TooLarge:
            if begun:
                raise
            await self._refuse_body(scope, receive, send)

    async def _refuse_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._refuse(413, f"a request may have at most {self._most_body} bytes", scope, receive, send)

    async def _refuse(self, status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        await JSONResponse({"error": error}, status)(scope, receive, send)

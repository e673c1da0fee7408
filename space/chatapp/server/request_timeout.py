"""Close connections whose request does not arrive in time; otherwise idle ones would occupy all connections."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMEOUT_REQUEST = 30  # seconds from a request's first moment to its last byte


class RequestTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a deadline for each request.

    uvicorn has only `timeout_keep_alive`: it begins after an answer and ends at the first byte of the next request.
    """

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
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request is complete
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(TIMEOUT_REQUEST, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

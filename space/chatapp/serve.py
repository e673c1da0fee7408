"""Put the rooms together: one ASGI app of page and API, served by uvicorn."""

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from chatapp.engine import Engine
from chatapp.page.chat_page import chat_page
from chatapp.page.model_card import Evaluation
from chatapp.page.theme import STYLE, THEME
from chatapp.server.access import Access, allow_origins
from chatapp.server.api_errors import handle_errors
from chatapp.server.fair_queue import FairQueue
from chatapp.server.openai_api import OpenAIApi
from chatapp.server.request_guard import MAX_BODY, guard
from chatapp.server.request_timeout import RequestTimeoutProtocol

MAX_CONNECTIONS = 512
# In a Space, requests come through a proxy in one of these networks. The proxy names the client.
PROXIES = ["127.0.0.1", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]


def build(
    engines: Mapping[str, Engine],
    queue: FairQueue,
    commit: str = "",
    access: Access | None = None,
    evaluation: Evaluation | None = None,
) -> FastAPI:
    """The ASGI app for these models, by name; the first is the default.

    `commit`, `evaluation`: the project's commit and what it measured, for the page. `access`: who may use the API
    (None: everybody).
    """
    access = access or Access()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    # FastAPI's documentation pages load scripts from another server.
    no_docs: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(lifespan=lifespan, **no_docs)
    guard(app)
    allow_origins(app, access.origins)  # outside of the guard, so that its errors can be read, too
    handle_errors(app, MAX_BODY)
    app.include_router(OpenAIApi(engines, queue, access).router)
    return gr.mount_gradio_app(
        app,
        chat_page(engines, queue, commit, evaluation, needs_key=bool(access.key)),
        path="/",
        theme=THEME,
        css_paths=STYLE,
        app_kwargs=no_docs,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )


def server_settings(in_a_space: bool) -> dict[str, Any]:
    """uvicorn's settings."""
    return {
        "http": RequestTimeoutProtocol,
        "ws": "none",
        "log_level": "warning",
        "limit_concurrency": MAX_CONNECTIONS,
        # Longer than clients keep a connection; otherwise one may send on a connection that closes at that moment.
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": 1,
        # Outside a Space, anybody could claim to be a new client with each request.
        "proxy_headers": in_a_space,
        "forwarded_allow_ips": PROXIES,
    }


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal ends it. Raises KeyboardInterrupt after an orderly end by Ctrl+C."""
    host, port = listener.getsockname()[:2]
    print(f"Chat page: http://{host}:{port}   API: http://{host}:{port}/v1   (Ctrl+C stops it)", flush=True)
    config = uvicorn.Config(app, **server_settings(in_a_space="SPACE_ID" in os.environ))
    uvicorn.Server(config).run(sockets=[listener])

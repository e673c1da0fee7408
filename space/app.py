"""The chat app: page, API and health in one process. Run: `make serve`; in a Space: `python app.py`.

It needs nothing but this folder, the packages of its requirements and exported models.
"""

import argparse
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from find_models import find_models

if TYPE_CHECKING:
    from engine import Engine
    from fair_queue import FairQueue
    from fastapi import FastAPI

# Read by the libraries when they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

COMMIT = Path(__file__).with_name("commit.txt")  # of the project that a Space was made from
MODELS = ("tuned", "base")  # the first that is there is the one to chat with
MOST_CONNECTIONS = 512
# In a Space, requests come through a proxy in one of these networks, which says whose they are.
PROXIES = ["127.0.0.1", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]


def build(engines: Mapping[str, "Engine"], queue: "FairQueue", commit: str = "") -> "FastAPI":
    """The ASGI app for these models, by name; the first is the default. `commit`: the project's, for the page."""
    import gradio as gr
    from fastapi import FastAPI
    from limits import Limits
    from openai_api import routes
    from page import STYLE, THEME, chat_page

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    # FastAPI's own pages load scripts from elsewhere.
    no_docs: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(lifespan=lifespan, **no_docs)
    app.add_middleware(Limits)
    app.include_router(routes(engines, queue))
    return gr.mount_gradio_app(
        app,
        chat_page(engines, queue, commit),
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


def load(folder: Path) -> dict[str, "Engine"]:
    """The exported models in `folder`, by name. Raises FileNotFoundError when there is none, ValueError when one is
    damaged."""
    there = [name for name in MODELS if (folder / name).is_dir()]
    if not there:
        raise FileNotFoundError(f"{folder} holds no exported model ({' or '.join(MODELS)})")
    from engine import Engine

    return {name: Engine(folder / name) for name in there}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when the port is taken, or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def server_settings(in_a_space: bool) -> dict[str, Any]:
    """How uvicorn serves the app."""
    from limits import PunctualProtocol

    return {
        "http": PunctualProtocol,
        "ws": "none",
        "log_level": "warning",
        "limit_concurrency": MOST_CONNECTIONS,
        "timeout_keep_alive": 30,  # longer than clients keep a connection: none finds it closed as it sends
        "timeout_graceful_shutdown": 1,
        # Elsewhere anybody could say whose a request is, and be a new client with each.
        "proxy_headers": in_a_space,
        "forwarded_allow_ips": PROXIES,
    }


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description=(__doc__ or "").partition("\n")[0])
    # Gradio's own variables, which a Space sets.
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    parser.add_argument("--models", type=Path, help="folder of exported models (default: see find_models.py)")
    parser.add_argument("--commit", default="", help="the project's commit, which the page tells (default: commit.txt)")
    parser.add_argument("--places", type=int, default=64, help="how many may wait for the model (default: 64)")
    parser.add_argument("--patience", type=float, default=60, help="seconds that one waits at most (default: 60)")
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options()
    if not 0 <= chosen.port <= 65535:
        sys.exit(f"error: --port {chosen.port}: a port is a number from 0 to 65535")
    try:
        # Before anything slow: a taken port is said at once.
        listener = listen(chosen.host, chosen.port)
    except OSError as error:
        sys.exit(
            f"error: {chosen.host}:{chosen.port} cannot be served ({error.strerror}). "
            "Stop what uses it, or choose another: make serve PORT=7861"
        )
    try:
        engines = load(chosen.models or find_models())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}." + (" Run `make all` to export it." if chosen.models else ""))
    import uvicorn
    from fair_queue import FairQueue

    commit = chosen.commit or (COMMIT.read_text(encoding="utf-8").strip() if COMMIT.is_file() else "")
    app = build(engines, FairQueue(chosen.places, chosen.patience), commit)
    host, port = listener.getsockname()[:2]
    print(f"Chat page: http://{host}:{port}   API: http://{host}:{port}/v1   (Ctrl+C ends it)", flush=True)
    config = uvicorn.Config(app, **server_settings(in_a_space="SPACE_ID" in os.environ))
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has ended in good order, and passes it on
        sys.exit(130)


if __name__ == "__main__":
    main()

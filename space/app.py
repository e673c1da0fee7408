"""The chat app: page, API and health in one process. Run: `make serve`; in a Space: `python app.py`.

It needs this folder, the packages of requirements.txt and exported models, and nothing else of the project.
"""

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from chatapp.engine import MAX_ROWS, load_engines
from chatapp.server.access import KEY, Access, checked_key
from chatapp.server.fair_queue import FairQueue
from chatapp.server.find_models import find_models

HERE = Path(__file__).parent
COMMIT = HERE / "commit.txt"  # `make space` writes the project's commit here
EVALUATION = HERE / "evaluation.json"  # and the evaluation of the models here


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description=(__doc__ or "").partition("\n")[0])
    # A Space sets Gradio's own variables.
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    parser.add_argument("--models", type=Path, help="folder of exported models (default: model/ or models.json here)")
    parser.add_argument("--commit", default="", help="the project's commit, for the page (default: from commit.txt)")
    parser.add_argument(
        "--evaluation", type=Path, default=EVALUATION, help="figures for the page, if the file is there"
    )
    parser.add_argument("--places", type=int, default=64, help="max requests that wait for the model (default: 64)")
    parser.add_argument("--patience", type=float, default=60, help="max seconds that a request waits (default: 60)")
    cors = "a site whose pages may call the API, such as https://example.org, or * for any; may be repeated"
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=cors)
    return parser.parse_args(arguments)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when the port is taken or not allowed."""
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


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """What the evaluate stage wrote, or None where the file is missing. A damaged one ends the app."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        sys.exit(f"error: {path} holds no evaluation ({error}). Delete it, and run `make all`.")


def main() -> None:
    chosen = options()
    if not 0 <= chosen.port <= 65535:
        sys.exit(f"error: --port {chosen.port}: a port is a number from 0 to 65535: make serve PORT=7861")
    try:
        access = Access(checked_key(os.environ.get(KEY, "")), tuple(chosen.cors))
    except ValueError as error:
        sys.exit(f"error: {error}.")
    try:
        listener = listen(chosen.host, chosen.port)
    except OSError as error:
        sys.exit(
            f"error: cannot listen on {chosen.host}:{chosen.port} ({error.strerror}). "
            "Stop the program that uses the port, or choose another one: make serve PORT=7861"
        )
    try:
        engines = load_engines(chosen.models or find_models(HERE))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}." + (" Run `make all` to export it." if chosen.models else ""))
    evaluation = read_evaluation(chosen.evaluation)
    # Imported only here: Gradio takes seconds, and the errors above are reported before that.
    from chatapp.serve import build, serve

    commit = chosen.commit or (COMMIT.read_text(encoding="utf-8").strip() if COMMIT.is_file() else "")
    try:
        queue = FairQueue(chosen.places, chosen.patience, at_once=MAX_ROWS)
        serve(build(engines, queue, commit, access, evaluation), listener)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""`make serve` becomes the server: ending it frees the port."""

import os
import signal
import socket
from contextlib import suppress

import psutil
import pytest

from tests.support.project import Project, wait_for

# It listens, and does nothing.
APP = """
import socket, sys, time
with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))):
    time.sleep(600)
"""


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number, whom", [("SIGTERM", "make"), ("SIGTERM", "server"), ("SIGKILL", "server")])
def test_a_killed_make_serve_frees_the_port(number, whom, project: Project):
    (project.folder / "space/app.py").write_text(APP, encoding="utf-8")
    project.make_environment()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    make = project.start("make", "serve", f"PORT={port}")
    try:
        wait_for(lambda: listens(port))
        (server,) = psutil.Process(make.pid).children(recursive=True)  # no shell between them
        given = server.cmdline()
        assert "space/app.py" in given and given[given.index("--models") + 1] == "models/onnx"
        assert given[given.index("--evaluation") + 1] == "reports/evaluation.json"  # what the page's About shows
        os.kill(make.pid if whom == "make" else server.pid, getattr(signal, number))
        make.wait(timeout=60)
        wait_for(lambda: not listens(port))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGKILL)

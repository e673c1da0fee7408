"""A Python that has the stages' libraries imported already: it runs each stage in a fork of itself.

Imports take a stage 10 to 15 s of a processor, a tiny model's work less than one. `WarmPython.python` stands for
`python` on a project's PATH: it hands `python -m` with one of MODULES to the warm process, and runs anything else as
it is. The project's own code is imported again each time, from the project's folder.

A fork ends with the `python` that asked for it, so a test may kill that one. The libraries have read their environment
before. So a variable of READ_AT_IMPORT with another value, and what a test asks of a process itself (signals, its
command line), need a real start.
Run: `python -m tests.support.warm SOCKET CLIENT SLEEPS`
"""

import importlib
import json
import logging
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import psutil

from stages.common.entry import set_environment
from tests.support.project import ROOT

READ_AT_IMPORT = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
PACKAGES = ("stages", "commands")  # the project's own
BUILDER = "onnxruntime_genai.models.builder"
MODULES = (*PACKAGES, "dvc", BUILDER, "tests.support.selection")
LIBRARIES = ("stages.fetch_model", "stages.train", "stages.merge", "stages.evaluate", "stages.export", "commands.plan")
LIBRARIES += (BUILDER, "dvc.cli", "dvc.repo", "dvc.commands.repro")
MAX_REQUEST = 1 << 16

CLIENT = """import json, os, socket, sys
modules, variables, address = {modules!r}, {variables!r}, {address!r}
given, environment = sys.argv[1:], dict(os.environ)
if given[:1] != ["-m"] or given[1] not in modules or [environment.get(name) for name in {names!r}] != variables:
    os.execv({real!r}, [{real!r}, *given])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(address)
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([os.getcwd(), environment, given]).encode() + b"\\n")
    status = server.recv(16)  # nothing where the stage was killed
sys.exit(int(status or b"137"))
"""


class WarmPython:
    """A warm process, started with `environment`; `folder` is where its files lie.

    `sleeps`: how much of a `time.sleep` its forks take, so that tests need not wait between attempts.
    """

    def __init__(self, folder: Path, environment: dict[str, str], sleeps: float = 1.0) -> None:
        self.python = folder / "bin/python"
        self.python.parent.mkdir(parents=True)
        address = folder / "socket"
        variables = [environment.get(name) for name in READ_AT_IMPORT]
        client = CLIENT.format(
            real=sys.executable, modules=MODULES, names=READ_AT_IMPORT, variables=variables, address=str(address)
        )
        (folder / "client.py").write_text(client, encoding="utf-8")
        # A shell starts it: the path of an interpreter after #! may hold no space.
        start = shlex.join([sys.executable, "-IS", str(folder / "client.py")])
        self.python.write_text(f'#!/bin/sh\nexec {start} "$@"\n', encoding="utf-8")
        self.python.chmod(0o755)
        command = [sys.executable, "-m", "tests.support.warm", str(address), str(self.python), str(sleeps)]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE)
        while not address.exists():
            assert self._process.poll() is None, "the warm process did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def import_libraries() -> None:
    """Import all that the stages import, and forget the stages themselves."""
    for name in LIBRARIES:
        importlib.import_module(name)
    logging.getLogger().handlers.clear()  # the builder adds one, which would print what DVC logs a second time
    for name in [name for name in sys.modules if name.split(".")[0] in (*PACKAGES, "tests")]:
        del sys.modules[name]


def shorten_sleeps(share: float) -> None:
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds * share)


def run_module(arguments: list[str]) -> int:
    """Run `python -m …` in this process; returns its exit status."""
    sys.argv[:] = ["-m", *arguments[2:]]
    sys.path[0] = os.getcwd()
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end_with(client: socket.socket) -> None:
    """End this process, and what it started, when the `python` that asked for it was killed."""
    if not client.recv(1):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        os._exit(1)


def answer(client: socket.socket, python: str) -> None:
    """Run what a client asks for, with its folder, environment, input and outputs, and return its exit status."""
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    request = b""
    while not request.endswith(b"\n"):
        part = client.recv(MAX_REQUEST)
        if not part:
            return
        request += part
    folder, environment, arguments = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    threading.Thread(target=end_with, args=(client,), daemon=True).start()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[1] in PACKAGES:
        sys.executable = python  # the processes that it starts are forks, too
    status = run_module(arguments)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    client.sendall(str(status).encode())


def main() -> None:
    set_environment(network=True)  # as at the start of each stage; `environment` says whether it is offline
    import_libraries()
    shorten_sleeps(float(sys.argv[3]))
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the forks
    address = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.partial")
        server.listen()
        server.settimeout(2)
        Path(f"{address}.partial").rename(address)
        while os.getppid() == parent:
            with suppress(TimeoutError):
                client, _ = server.accept()
                client.setblocking(True)
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    server.close()
                    answer(client, sys.argv[2])
                    os._exit(0)
                client.close()


if __name__ == "__main__":
    main()

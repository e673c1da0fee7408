"""`python app.py`: it runs alone in its folder, ends by Ctrl+C, and reports in one line why it cannot serve."""

import ast
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app import listen
from bench.chat_server import answers, chat_server, printed_address, wait_until
from chatapp.serve import server_settings
from tests.support.project import ROOT
from tests.support.scripted import EVALUATION

SPACE = ROOT / "space"
ELSEWHERE = {"bench", "commands", "stages", "tests", "torch", "transformers"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_space_imports_neither_torch_nor_the_rest_of_the_project():
    files = list(SPACE.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        assert not ELSEWHERE & {name.partition(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("room, later", [("engine", ("server", "page")), ("server", ("page",))])
def test_rooms_import_one_way(room, later):
    forbidden = tuple(f"chatapp.{other}" for other in later)
    for path in (SPACE / "chatapp" / room).glob("*.py"):
        assert not [name for name in imports(path) if name.startswith(forbidden)], path
        assert "gradio" not in imports(path), path


def test_libraries_send_no_telemetry():
    code = "import chatapp.server.find_models, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    result = subprocess.run([sys.executable, "-c", code], cwd=SPACE, env={}, capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def test_a_client_cannot_claim_an_address():
    """Outside a Space, no header is trusted; otherwise each request could claim to be another client's."""
    assert server_settings(in_a_space=False)["proxy_headers"] is False
    trusted = server_settings(in_a_space=True)
    assert trusted["proxy_headers"] is True and "10.0.0.0/8" in trusted["forwarded_allow_ips"]


def refused(*arguments) -> str:
    """The one line that the app ends with; it must come before Gradio is imported, which takes seconds."""
    code = "import atexit, sys, app; atexit.register(lambda: print('gradio' in sys.modules)); app.main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=SPACE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == "False\n"
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.slow
def test_what_cannot_be_served_is_one_quick_line(tmp_path, tiny_models, monkeypatch):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert refused("--port", port).startswith(f"error: cannot listen on 127.0.0.1:{port} (")
    assert "no exported model" in refused("--models", tmp_path, "--port", 0)
    (tmp_path / "evaluation.json").write_text("[")
    line = refused("--models", tiny_models, "--evaluation", tmp_path / "evaluation.json", "--port", 0)
    assert "evaluation.json holds no evaluation (" in line
    assert refused("--port", 70000).startswith("error: --port 70000: ")
    monkeypatch.setenv("CHAT_API_KEY", "two words")
    assert refused("--port", 0) == "error: CHAT_API_KEY may have only printable ASCII characters, and no space."


@pytest.mark.slow
def test_the_key_and_the_sites_reach_the_api(tiny_models, monkeypatch):
    monkeypatch.setenv("CHAT_API_KEY", "s3cret")
    with chat_server(tiny_models, "--cors", "https://a.example", "--cors", "https://b.example") as (address, _):
        url = f"{address}/v1/models"
        assert httpx.get(url).status_code == 401
        right = httpx.get(url, headers={"Authorization": "Bearer s3cret", "Origin": "https://b.example"})
        assert right.status_code == 200 and right.headers["access-control-allow-origin"] == "https://b.example"


@pytest.mark.slow
def test_the_folder_runs_alone_and_ctrl_c_ends_it(tiny_models, tmp_path):
    folder = shutil.copytree(SPACE, tmp_path / "alone", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_models / "tuned", folder / "model/tuned")
    (folder / "commit.txt").write_text("0123abcd\n")
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    command = [sys.executable, "app.py", "--port", "0"]
    # A shell that runs the tests in the background ignores SIGINT, and the app would inherit that.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            address = printed_address(process)
            wait_until(lambda: answers(address))
            page = httpx.get(address).text
            assert "0123abcd" in page and "[-0.362, -0.245]" in page
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()

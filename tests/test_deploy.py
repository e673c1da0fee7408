"""Publishing: the hub gets the model and the Space, once; what is refused is one line; the Space it serves chats."""

import ast
import json
import os
import subprocess
import sys

import pytest
from hub import Hub, running

from stages.deploy import listing
from stages.space import gradio_version, space_card

TOKEN = "hf_secret"
CARD = {
    "base_model": {"source": "microsoft/phi-2", "revision": "ef38", "license": "mit"},
    "datasets": [{"source": "OpenAssistant/oasst1", "revision": "fdf7", "license": "apache-2.0"}],
    "training": {"params": {"max_steps": 500}, "train_conversations": 161},
    "export": {"export_precision": "int4"},
    "quality": {"perplexity": 12.345, "perplexity_before": 12.3},
}


def test_the_card_says_what_the_hub_and_a_reader_need():
    text = space_card(CARD, "6.0.0", "abc", "ada/chat")
    front = text.split("---")[1]
    for line in (
        "sdk: gradio",
        "sdk_version: 6.0.0",
        "app_file: app.py",
        "license: mit",
        "- ada/chat",
        "- microsoft/phi-2",
    ):
        assert line in front
    assert "12.35" in text and "`abc`" in text and "- OpenAssistant/oasst1" in front
    local = {**CARD, "base_model": {"source": "pypi:x==1/y", "revision": "sha256:0", "license": None}}
    assert "models:" not in space_card(local, "6.0.0", "abc", None).split("---")[1]
    assert len(front.split("short_description: ")[1].splitlines()[0]) <= 60  # the hub's limit


def test_requirements_are_pinned_and_without_torch():
    from conftest import ROOT

    text = (ROOT / "space/requirements.txt").read_text(encoding="utf-8")
    packages = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert packages and all("==" in line for line in packages)
    names = {line.partition("==")[0].lower() for line in packages}
    assert not names & {"torch", "transformers", "bitsandbytes", "peft", "trl", "datasets"}
    locked = set((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())
    assert set(packages) <= locked  # the versions that the tests run with
    imported = set()
    for path in (ROOT / "space").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    own = {path.stem for path in (ROOT / "space").glob("*.py")}
    assert {name.replace("_", "-") for name in imported - own - sys.stdlib_module_names} <= names
    assert gradio_version(text)


def test_a_listing_names_every_file_with_its_size(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.bin").write_bytes(b"x" * 2_500_000)
    (tmp_path / "README.md").write_text("hello")
    lines = listing("ada/chat", "space", tmp_path)
    assert lines[0] == "space ada/chat: 2 files, 2.5 MB"
    assert lines[2].split() == ["2.500", "MB", "model/a.bin"]


@pytest.fixture
def exported_project(tiny_project):
    tiny_project.run("dvc", "repro", "--quiet", "export")
    tiny_project.commit("exported")
    return tiny_project


@pytest.fixture
def hub(tmp_path):
    served = Hub()
    served.storage = tmp_path / "hub"
    served.users = {TOKEN: "ada", "hf_other": "bob"}
    with running(served):
        yield served


CHAT = """
import json, sys
from engine import Engine, Sampling
engine = Engine("model/tuned", threads=1)
chunks = list(engine.stream([{"role": "user", "content": "What is 1 + 1?"}], Sampling(temperature=0, max_tokens=8)))
loaded = [name for name in ("torch", "transformers", "stages") if name in sys.modules]
print(json.dumps([chunks[-1].finish_reason, chunks[-1].tokens, loaded]))
"""


@pytest.mark.slow
def test_deploy(exported_project, hub, tmp_path):
    project = exported_project

    def deploy(*arguments: str, check: bool = True, **environment: str):
        settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        return project.run("stages.deploy", *arguments, check=check, **{**settings, **environment})

    def refused(*arguments: str, **environment: str) -> str:
        result = deploy(*arguments, check=False, **environment)
        said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode == 1 and len(said) == 1 and "Traceback" not in result.stderr
        assert TOKEN not in result.stdout + result.stderr
        return said[0]

    # A dry run sends nothing, and asks nothing.
    listed = deploy("ada/chat", "--dry", HF_TOKEN="").stdout
    assert "model ada/chat:" in listed and "onnx/model.onnx" in listed and "adapter/adapter_model.safetensors" in listed
    assert "space ada/chat:" in listed and "model/tuned/card.json" in listed and hub.requests == []

    # What is refused.
    assert "SPACE=user/name" in refused("nonsense")
    assert "there is no token" in refused("ada/chat", HF_TOKEN="")
    assert "does not accept the token" in refused("ada/chat", HF_TOKEN="hf_wrong")
    assert "may not write to ada/chat" in refused("ada/chat", HF_TOKEN="hf_other")
    assert "cannot be reached, or was lost" in refused("ada/chat", HF_ENDPOINT="http://127.0.0.1:9")
    assert not hub.repositories

    # A first one, cut in the middle, and again: what was sent is not sent again.
    hub.room = 2
    assert "or was lost" in refused("ada/chat")
    sent, hub.room = set(hub.blobs), None
    assert len(sent) == 2 and hub.commits == 0
    requests = len(hub.requests)
    deploy("ada/chat")
    put = [request.rpartition("/")[2] for request in hub.requests[requests:] if request.startswith("PUT")]
    assert put and len(put) == len(set(put)) and not sent & set(put)
    model, space = hub.repositories["models", "ada/chat"][1], hub.repositories["spaces", "ada/chat"][1]
    for name in ("model.safetensors", "README.md", "onnx/model.onnx.data", "adapter/adapter_model.safetensors"):
        assert (model / name).stat().st_size > 0
    assert "- ada/chat" in (space / "README.md").read_text(encoding="utf-8")

    # A second one sends nothing; one after a change sends just that, and takes away what is gone.
    commits, requests = hub.commits, len(hub.requests)
    assert deploy("ada/chat").stdout.count("as it was") == 2
    assert hub.commits == commits
    assert not [r for r in hub.requests[requests:] if r.startswith("PUT") or "/commit/" in r]
    (project.folder / "space/extra.py").write_text("# more\n")
    deploy("ada/chat")
    assert (space / "extra.py").is_file() and hub.commits == commits + 1
    (project.folder / "space/extra.py").unlink()
    deploy("ada/chat")
    assert not (space / "extra.py").exists()

    # A repository of that name that no deploy made is left alone.
    other = hub.storage / "models/ada/other"
    other.mkdir(parents=True)
    (other / "thesis.md").write_text("hers\n")
    hub.add("models", "ada/other", "9" * 40, other)
    assert "ada/other holds other things" in refused("ada/other") and (other / "thesis.md").is_file()

    # The Space, as the hub gives it, runs alone.
    download = (
        "import sys; from huggingface_hub import snapshot_download; "
        f"snapshot_download('ada/chat', repo_type='space', local_dir={str(tmp_path / 'space')!r})"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env["HF_HOME"] = str(tmp_path / "home")
    subprocess.run([sys.executable, "-c", download], env=env, check=True, cwd=tmp_path)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", CHAT], cwd=tmp_path / "space", env=alone, capture_output=True, text=True, check=True
    )
    finish, tokens, loaded = json.loads(result.stdout)
    assert finish in ("stop", "length") and tokens > 0 and loaded == []

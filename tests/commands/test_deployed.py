"""Publishing: the hub gets the model and the Space, once; what is refused is one line; the Space it serves chats."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest

from tests.support.hub import Hub, running
from tests.support.project import Project, error_line

pytestmark = pytest.mark.slow

TOKEN = "hf_secret"
# For PYTHONPATH: a connection that failed is tried again at once.
HURRIED = "import time\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(seconds / 50)\n"


class Publisher(NamedTuple):
    """A finished project and the hub that it deploys to."""

    project: Project
    hub: Hub
    hurried: Path

    def deploy(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        settings = {"HF_ENDPOINT": self.hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_TOKEN": TOKEN, "PYTHONPATH": str(self.hurried), **environment}
        return self.project.run("commands", "deploy", *arguments, check=check, **settings)

    def refused(self, *arguments: str, **environment: str) -> str:
        result = self.deploy(*arguments, check=False, **environment)
        assert result.returncode == 1 and TOKEN not in result.stdout + result.stderr
        return error_line(result)

    def sent_since(self, number: int) -> list[str]:
        """The requests after the first `number` that change what the hub has."""
        return [said for said in self.hub.requests[number:] if said.startswith("PUT") or "/commit/" in said]


@pytest.fixture(scope="module")
def publisher(finished, tmp_path_factory) -> Iterator[Publisher]:
    """Each process of it is a real start."""
    folder = tmp_path_factory.mktemp("deploy")
    project = finished.copy(folder / "a project")
    project.python = Path(sys.executable)
    (folder / "hurried").mkdir()
    (folder / "hurried/sitecustomize.py").write_text(HURRIED)
    hub = Hub()
    hub.storage = folder / "hub"
    hub.users = {TOKEN: "ada", "hf_other": "bob"}
    with running(hub):
        yield Publisher(project, hub, folder / "hurried")


@pytest.fixture(scope="module")
def deployed(publisher) -> Publisher:
    """The same, with ada/chat on the hub."""
    publisher.deploy("ada/chat")
    return publisher


@pytest.fixture(scope="module")
def space(deployed, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The Space, as the hub gives it, and the environment in which it finds the hub."""
    home = tmp_path_factory.mktemp("space")
    on_hub = {"HF_ENDPOINT": deployed.hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf")}
    download = (
        "import sys; from huggingface_hub import snapshot_download; "
        f"snapshot_download('ada/chat', repo_type='space', local_dir={str(home / 'space')!r})"
    )
    env = {**os.environ, **on_hub, "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", download], env=env, check=True, cwd=home)
    return home / "space", on_hub


@contextmanager
def app_of(folder, **environment):
    """Start the app as a Space does, in its own folder with nothing else; gives its address."""
    command = [sys.executable, "app.py", "--port", "0"]
    alone = {"PATH": "/usr/bin:/bin", "HOME": str(folder.parent), "LANG": "C.UTF-8", **environment}
    process = subprocess.Popen(command, cwd=folder, env=alone, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield next(word for word in line.split() if word.startswith("http"))
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def chats(address: str) -> str:
    """What the app's default model answers by the official client; asserts that the page is there, too."""
    assert 'property="og:title"' in httpx.get(address).text
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        messages = [{"role": "user", "content": "What is 1 + 1?"}]
        options = {"model": "tuned", "messages": messages, "max_tokens": 8, "temperature": 0, "seed": 1}
        pieces = list(client.chat.completions.create(**options, stream=True))
        assert [model.id for model in client.models.list()] == ["tuned", "base"]
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


def test_a_dry_run_lists_every_file_and_asks_the_hub_nothing(publisher):
    requests = len(publisher.hub.requests)
    listed = publisher.deploy("ada/dry", "--dry", HF_TOKEN="").stdout
    for name in (
        "onnx/tuned/model.onnx",
        "onnx/base/model.onnx",
        "gguf/tuned-Q8_0.gguf",
        "gguf/Modelfile",
        "adapter/adapter_model.safetensors",
        "reports/exported.json",
    ):
        assert name in listed
    assert "model ada/dry:" in listed and "space ada/dry:" in listed and "models.json" in listed
    assert len(publisher.hub.requests) == requests


def test_what_is_refused_is_one_line_and_makes_no_repository(publisher):
    before = set(publisher.hub.repositories)
    for name in ("nonsense", "", "ada/a..b", "ada/b/c"):
        assert "SPACE=user/name" in publisher.refused(name, "--dry")
    assert "there is no token" in publisher.refused("ada/new", HF_TOKEN="")
    assert "does not accept the token" in publisher.refused("ada/new", HF_TOKEN="hf_wrong")
    assert "may not write to ada/new" in publisher.refused("ada/new", HF_TOKEN="hf_other")
    assert "the connection to the hub failed" in publisher.refused("ada/new", HF_ENDPOINT="http://127.0.0.1:9")
    assert set(publisher.hub.repositories) == before


def test_after_a_cut_only_the_rest_is_sent(publisher):
    hub = publisher.hub
    hub.blobs.clear()  # what another test has sent
    commits, hub.room = hub.commits, 2
    assert "the connection to the hub failed" in publisher.refused("ada/cut")
    sent, hub.room = set(hub.blobs), None
    assert len(sent) == 2 and hub.commits == commits
    requests = len(hub.requests)
    publisher.deploy("ada/cut")
    put = [request.rpartition("/")[2] for request in publisher.sent_since(requests) if request.startswith("PUT")]
    assert put and len(put) == len(set(put)) and not sent & set(put)


def test_the_hub_has_the_model_and_a_space_that_pins_it(deployed):
    commit, model = deployed.hub.repositories["models", "ada/chat"]
    space = deployed.hub.repositories["spaces", "ada/chat"][1]
    for name in ("model.safetensors", "README.md", "onnx/tuned/model.onnx.data", "adapter/adapter_model.safetensors"):
        assert (model / name).stat().st_size > 0
    assert "- ada/chat" in (space / "README.md").read_text(encoding="utf-8")
    assert (model / "gguf/tuned-Q8_0.gguf").read_bytes()[:4] == b"GGUF" and (model / "gguf/Modelfile").is_file()
    card = (model / "README.md").read_text(encoding="utf-8")
    assert 'model="ada/chat"' in card and "ollama create mine -f gguf/Modelfile" in card
    adapter = json.loads((model / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] is None and adapter["r"] == 16  # its base is a file, on no hub
    pin = json.loads((space / "models.json").read_text())
    assert pin == {"repository": "ada/chat", "revision": commit}
    assert not [path for path in space.rglob("*") if path.stat().st_size > 2_000_000]  # the hub bounds a Space's own


def test_a_deploy_sends_only_what_changed_and_removes_what_is_gone(deployed):
    hub, extra = deployed.hub, deployed.project.folder / "space/extra.py"
    space = hub.repositories["spaces", "ada/chat"][1]
    commits, requests = hub.commits, len(hub.requests)
    assert deployed.deploy("ada/chat").stdout.count("as it was") == 2
    assert hub.commits == commits and not deployed.sent_since(requests)
    extra.write_text("# more\n")
    deployed.deploy("ada/chat")
    assert (space / "extra.py").is_file() and hub.commits == commits + 1
    extra.unlink()
    deployed.deploy("ada/chat")
    assert not (space / "extra.py").exists()


def test_a_repository_that_no_deploy_made_is_left_alone(publisher):
    other = publisher.hub.storage / "models/ada/other"
    other.mkdir(parents=True)
    (other / "thesis.md").write_text("hers\n")
    publisher.hub.add("models", "ada/other", "9" * 40, other)
    assert "model ada/other was not made by a deploy" in publisher.refused("ada/other")
    assert (other / "thesis.md").is_file()


def test_the_space_chats_from_the_hub_preloaded_and_as_make_space_builds_it(deployed, space):
    """It runs alone, with the models of the model repository; built here, it runs without a hub. All answers agree."""
    folder, on_hub = space
    with app_of(folder, **on_hub) as address:
        answer = chats(address)
    with app_of(folder, **on_hub, HF_HUB_OFFLINE="1", SPACE_ID="ada/chat") as address:  # preloaded
        assert chats(address) == answer
    deployed.project.run("commands", "space")
    built = deployed.project.folder / "build/space"
    with app_of(built, HF_HUB_OFFLINE="1") as address:
        assert chats(address) == answer
    for name in ("LICENSE", "commit.txt", "evaluation.json", "requirements.txt"):
        assert (built / name).stat().st_size > 0


def test_a_model_repository_that_is_gone_is_one_line(deployed, space, monkeypatch, tmp_path):
    monkeypatch.delitem(deployed.hub.repositories, ("models", "ada/chat"))
    folder, on_hub = space
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **on_hub, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "app.py", "--port", "0"]
    gone = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1 and "error: ada/chat at" in gone.stderr

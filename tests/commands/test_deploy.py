"""Publishing: the hub gets the model and the Space, once; what is refused is one line; the Space it serves chats."""

import ast
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import httpx
import openai
import pytest
from packaging.utils import canonicalize_name

from commands.deploy import hub_card, listing
from commands.space import Pin, gradio_version, pinned_closure, space_card
from stages.common.cards import model_card
from stages.common.errors import StageError
from tests.support.hub import Hub, running
from tests.support.project import ROOT

TOKEN = "hf_secret"
CARD = {
    "base_model": {"source": "microsoft/phi-2", "revision": "ef38", "hub": "microsoft/phi-2", "license": "mit"},
    "datasets": [
        {
            "source": "OpenAssistant/oasst1/one/file.jsonl.gz",
            "revision": "fdf7",
            "hub": "OpenAssistant/oasst1",
            "license": "apache-2.0",
        }
    ],
    "training": {"params": {"max_steps": 500}, "train_conversations": 161},
    "export": {"export_precision": "int4"},
    "quality": {"perplexity": 12.345, "perplexity_before": 12.3},
}


def test_the_card_says_what_the_hub_and_a_reader_need():
    text = space_card(CARD, "6.0.0", "abc", Pin("ada/chat", "5" * 40), ["onnx/tuned/card.json", "onnx/base/card.json"])
    front = text.split("---")[1]
    for line in (
        "sdk: gradio",
        "sdk_version: 6.0.0",
        "app_file: app.py",
        "license: mit",
        "- ada/chat",
        f"- ada/chat onnx/tuned/card.json,onnx/base/card.json {'5' * 40}",
        "- microsoft/phi-2",
    ):
        assert line in front
    assert "12.35" in text and "`abc`" in text and "- OpenAssistant/oasst1" in front
    base = {"source": "pypi:x==1/y", "revision": "sha256:0", "hub": None, "license": None}
    local = {**CARD, "base_model": base, "datasets": [{**base, "source": "file:data/local/x"}]}
    alone = space_card(local, "6.0.0", "abc", None).split("---")[1]
    assert "models:" not in alone and "preload" not in alone and "datasets:" not in alone
    assert "license: other" in alone
    assert len(front.split("short_description: ")[1].splitlines()[0]) <= 60  # the hub's limit


def test_requirements_are_pinned_and_without_torch():
    def pins(text: str) -> dict[str, str]:
        """Package names, as the index spells them, and versions."""
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all("==" in line for line in lines)
        return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}

    text = (ROOT / "space/requirements.txt").read_text(encoding="utf-8")
    packages, locked = pins(text), pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert packages and not packages.keys() & {"torch", "transformers", "bitsandbytes", "peft", "trl", "datasets"}
    assert packages.items() <= locked.items()  # the versions that the tests run with
    imported = set()
    for path in (ROOT / "space").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    own = {path.stem for path in (ROOT / "space").glob("*.py")} | {"chatapp"}
    assert {canonicalize_name(name) for name in imported - own - sys.stdlib_module_names} <= packages.keys()
    assert gradio_version(text)
    # A Space gets all that these need, too, at the versions of the lock.
    closure = pins(pinned_closure(text))
    assert packages.items() < closure.items() <= locked.items()
    assert not closure.keys() & {"torch", "transformers"}
    with pytest.raises(StageError, match="no-such-package is not installed"):
        pinned_closure("no-such-package==1")


def test_the_models_card_on_the_hub_names_what_is_there():
    base = {"source": "file:models/merged", "revision": None, "hub": None, "license": None}
    training = {"params": {"note": 'from "models/merged"'}, "held_out_loss_before": 3.0, "held_out_loss_after": 2.0}
    merge = {"merge_base": "original", "merge_dtype": "float16"}
    text = hub_card(model_card(training, base, [base], merge, "ada/chat"), "ada/chat")
    assert 'model="ada/chat"' in text and "is in `reports/evaluation.json`" in text and "spaces/ada/chat" in text
    # What a run was made with stays as it was recorded.
    assert "`file:models/merged` at the version in the project" in text and '`from "models/merged"`' in text
    at_home = model_card(training, base, [base], merge)
    assert 'model="models/merged"' in at_home and "is in the project's `reports/evaluation.json`" in at_home


def test_a_listing_names_every_file_with_its_size(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.bin").write_bytes(b"x" * 2_500_000)
    (tmp_path / "README.md").write_text("hello")
    lines = listing("ada/chat", "space", tmp_path)
    assert lines[0] == "space ada/chat: 2 files, 2.5 MB"
    assert lines[2].split() == ["2.500", "MB", "model/a.bin"]


@pytest.fixture
def hub(tmp_path):
    served = Hub()
    served.storage = tmp_path / "hub"
    served.users = {TOKEN: "ada", "hf_other": "bob"}
    with running(served):
        yield served


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


@pytest.fixture
def hurried(tmp_path):
    """For PYTHONPATH: a connection that failed is tried again at once."""
    folder = tmp_path / "hurried"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import time\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(seconds / 50)\n"
    )
    return str(folder)


@pytest.mark.slow
def test_deploy(cold_project, hub, hurried, tmp_path):
    project = cold_project

    def deploy(*arguments: str, check: bool = True, **environment: str):
        settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        settings["PYTHONPATH"] = hurried
        return project.run("commands", "deploy", *arguments, check=check, **{**settings, **environment})

    def refused(*arguments: str, **environment: str) -> str:
        result = deploy(*arguments, check=False, **environment)
        said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode == 1 and len(said) == 1 and "Traceback" not in result.stderr
        assert TOKEN not in result.stdout + result.stderr
        return said[0]

    # A dry run sends nothing, and asks nothing.
    listed = deploy("ada/chat", "--dry", HF_TOKEN="").stdout
    for name in (
        "onnx/tuned/model.onnx",
        "onnx/base/model.onnx",
        "adapter/adapter_model.safetensors",
        "reports/exported.json",
    ):
        assert name in listed
    assert "model ada/chat:" in listed and "space ada/chat:" in listed and "models.json" in listed
    assert hub.requests == []

    # What is refused.
    for name in ("nonsense", "", "ada/a..b", "ada/b/c"):
        assert "SPACE=user/name" in refused(name, "--dry")
    assert "there is no token" in refused("ada/chat", HF_TOKEN="")
    assert "does not accept the token" in refused("ada/chat", HF_TOKEN="hf_wrong")
    assert "may not write to ada/chat" in refused("ada/chat", HF_TOKEN="hf_other")
    assert "the connection to the hub failed" in refused("ada/chat", HF_ENDPOINT="http://127.0.0.1:9")
    assert not hub.repositories

    # A first one, cut in the middle, and again: what was sent is not sent again.
    hub.room = 2
    assert "the connection to the hub failed" in refused("ada/chat")
    sent, hub.room = set(hub.blobs), None
    assert len(sent) == 2 and hub.commits == 0
    requests = len(hub.requests)
    deploy("ada/chat")
    put = [request.rpartition("/")[2] for request in hub.requests[requests:] if request.startswith("PUT")]
    assert put and len(put) == len(set(put)) and not sent & set(put)
    model, space = hub.repositories["models", "ada/chat"][1], hub.repositories["spaces", "ada/chat"][1]
    for name in ("model.safetensors", "README.md", "onnx/tuned/model.onnx.data", "adapter/adapter_model.safetensors"):
        assert (model / name).stat().st_size > 0
    assert "- ada/chat" in (space / "README.md").read_text(encoding="utf-8")
    assert 'model="ada/chat"' in (model / "README.md").read_text(encoding="utf-8")
    adapter = json.loads((model / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] is None and adapter["r"] == 16  # its base is a file, on no hub
    pin = json.loads((space / "models.json").read_text())
    assert pin == {"repository": "ada/chat", "revision": hub.repositories["models", "ada/chat"][0]}
    assert not [path for path in space.rglob("*") if path.stat().st_size > 2_000_000]  # the hub bounds a Space's own

    # A second one sends nothing; one after a change sends just that, and removes what is gone.
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
    assert "model ada/other was not made by a deploy" in refused("ada/other") and (other / "thesis.md").is_file()

    # The Space, as the hub gives it, runs alone, with the models of the model repository; and what `make space` makes
    # runs without a hub and gives the same answers.
    download = (
        "import sys; from huggingface_hub import snapshot_download; "
        f"snapshot_download('ada/chat', repo_type='space', local_dir={str(tmp_path / 'space')!r})"
    )
    on_hub = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    env = {**os.environ, **on_hub, "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", download], env=env, check=True, cwd=tmp_path)
    with app_of(tmp_path / "space", **on_hub) as address:
        answer = chats(address)
    with app_of(tmp_path / "space", **on_hub, HF_HUB_OFFLINE="1", SPACE_ID="ada/chat") as address:  # preloaded
        assert chats(address) == answer
    project.run("commands", "space")
    with app_of(project.folder / "build/space", HF_HUB_OFFLINE="1") as address:
        assert chats(address) == answer
    for licence in ("LICENSE", "commit.txt", "requirements.txt"):
        assert (project.folder / "build/space" / licence).stat().st_size > 0

    # A model repository that is gone is one line.
    del hub.repositories["models", "ada/chat"]
    gone = subprocess.run(
        [sys.executable, "app.py", "--port", "0"],
        cwd=tmp_path / "space",
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **on_hub, "HF_HOME": str(tmp_path / "other")},
        capture_output=True,
        text=True,
    )
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1 and "error: ada/chat at" in gone.stderr

"""What tests of complete runs share: an empty small project, and the reference recipe on a hub on loopback."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.support.hub import Hub, running
from tests.support.hub_repositories import ALL_TREES, REFERENCE, SHARD, SMALLER, oasst_rows, settings
from tests.support.models import save_phi
from tests.support.project import ROOT, TINY, Project, set_params
from tests.support.warm import WarmPython


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty project with the small recipe, in which the test runs."""
    shutil.copytree(ROOT / "stages/templates", tmp_path / "stages/templates")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    set_params(tmp_path, **TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("hub")
    model = save_phi(folder / "phi-2")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A small Phi\n")
    config = json.loads((model / "config.json").read_text())
    # Offered, never taken: transformers knows this type itself.
    config["auto_map"] = {"AutoConfig": "modeling_phi.Config", "AutoModelForCausalLM": "modeling_phi.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_phi.py").write_text("raise SystemExit('code of a repository was run')\n")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    data = folder / "oasst1"
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Conversations\n")
    for split, first, count in (("train", 0, 24), ("validation", 24, 6)):
        frame = pd.DataFrame(oasst_rows(first, count)).astype({"rank": "Int32", "review_count": "int32"})
        frame.to_parquet(data / f"data/{split}-{SHARD}.parquet", index=False)
    with gzip.open(data / ALL_TREES, "wt", encoding="utf-8") as file:
        for row in oasst_rows(50, 20):
            if row["parent_id"] is None:
                answer = {"message_id": f"{row['message_id']}.a", "text": "Yes.", "role": "assistant", "replies": []}
                tree = {"message_tree_id": row["message_id"], "tree_state": "ready_for_export"}
                file.write(json.dumps({**tree, "prompt": {**row, "replies": [answer]}}) + "\n")
    return {"model": model, "data": data}


@pytest.fixture(scope="session")
def server():
    """A hub without repositories."""
    with running(Hub()) as served:
        yield served


@pytest.fixture
def hub(server, repositories):
    """The hub with phi-2 and OASST1, and no fault."""
    server.reset()
    server.add("models", REFERENCE.base_model, REFERENCE.base_model_revision, repositories["model"])
    server.add("datasets", REFERENCE.dataset, REFERENCE.dataset_revision, repositories["data"])
    return server


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Where the hub's libraries keep what they downloaded."""
    return tmp_path_factory.mktemp("home") / "hf"


@pytest.fixture(scope="session")
def warm_for_the_hub(tmp_path_factory, server, home) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("warm")
    warm = WarmPython(folder, {**Project(folder).environment(), **settings(server, home)}, sleeps=0.02)
    yield warm.python
    warm.stop()


@pytest.fixture
def reference(project, hub, home, warm_for_the_hub):
    """A project with the reference recipe, and a function that runs a module of it against the hub."""
    project.run("commands", "recipe", "phi2-oasst1")
    project.set(**SMALLER)
    project.commit("reference recipe")
    shutil.rmtree(home, ignore_errors=True)
    project.python = warm_for_the_hub

    def run(*command: str, check: bool = True, **environment: str):
        return project.run(*command, check=check, **{**settings(hub, home), **environment})

    return project, run

"""What a deploy writes: cards, requirements and listings. tests/commands/test_deployed.py deploys for real."""

import ast
import sys

import pytest
from packaging.utils import canonicalize_name

from commands.deploy import hub_card, listing
from commands.space import Pin, gradio_version, pinned_closure, space_card
from stages.common.cards import model_card
from stages.common.errors import StageError
from tests.support.project import ROOT

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
    card = model_card(training, base, [base], merge, "ada/chat")
    text = hub_card(card, "ada/chat", ["tuned-Q8_0.gguf"], True)
    assert "llama-cli -m gguf/tuned-Q8_0.gguf --jinja" in text and "ollama create mine -f gguf/Modelfile" in text
    assert 'hf download ada/chat --include "onnx/tuned/*" --local-dir .' in text and 'og.Model("onnx/tuned")' in text
    assert "lms import gguf/tuned-Q8_0.gguf" in text
    assert "Ollama |" not in hub_card(card, "ada/chat", ["tuned-Q8_0.gguf"], False)
    assert "gguf" not in hub_card(card, "ada/chat", [], False)
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

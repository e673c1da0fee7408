"""What is never done: no pickle is loaded, no code of a repository is run, no token is named in the code."""

import ast
import json
import shutil

import pytest
import torch

from stages.common import models
from stages.common.checkpoints import SEAL, last_checkpoint, seal
from stages.common.errors import StageError
from stages.common.trainer import resume
from tests.support.params import TINY_TRAINING, train_params
from tests.support.project import ROOT
from tests.support.training import tiny_trainer, tokens

FILES = sorted(path for folder in ("stages", "commands", "space") for path in (ROOT / folder).rglob("*.py"))
CODE = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def calls():
    return [(path, node) for path, tree in CODE.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_code_of_a_repository_and_only_safetensors():
    asked = set()
    for path, call in calls():
        given = {keyword.arg for keyword in call.keywords}
        if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained":
            assert "use_safetensors" in given or "gguf_file" in given, path
        if ast.unparse(call.func).endswith(".from_pretrained") and "gguf_file" not in given:
            # PEFT's knows no code of a repository; it is handed a model.
            assert "trust_remote_code" in given or "PeftModel" in ast.unparse(call.func), path
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False, path
            if keyword.arg == "use_safetensors":
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is True, path
            asked.add(keyword.arg)
    assert {"trust_remote_code", "use_safetensors"} <= asked


def test_no_stage_unpickles_or_reads_a_token():
    for path, tree in CODE.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "joblib", "dill"} & set(names), path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "np.load", "pd.read_pickle"), path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value != "HF_TOKEN", path  # a message may name it


def test_pickled_weights_are_not_loaded(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(StageError, match="cannot be loaded"):
        models.load_model(folder, torch.float32)


class Bomb:
    def __reduce__(self):
        return print, ("a pickle was run",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_in_it_is_not_run(name, tiny_llama, tmp_path, capsys):
    """Even with a seal that fits: whoever can write a checkpoint can write that, too."""
    params = train_params(**{**TINY_TRAINING, "max_steps": 2, "save_steps": 1, "eval_steps": 2})
    rows, tokenizer = tokens(tiny_llama, "chatml")

    def trainer():
        return tiny_trainer(tiny_llama, params, rows, tokenizer, tmp_path, held_out=rows[:2])

    trainer().train()
    (tmp_path / "checkpoint-2" / SEAL).unlink()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-1"
    torch.save(Bomb(), checkpoint / name)
    sealed = json.loads((checkpoint / SEAL).read_text())
    seal(checkpoint, sealed["loss_sum"], sealed["last_logged"])
    with pytest.raises(StageError, match="holds no training state, and was not loaded. Delete it"):
        resume(trainer(), checkpoint)
    assert "a pickle was run" not in capsys.readouterr().out

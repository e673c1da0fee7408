"""What tests share: tiny models and tokenizers made on the spot, and copies of the project to run for real.

No test needs a network or a downloaded model.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/smollm2-cpu.yaml"
SHARED_OASST1 = ROOT.parent / "shared/data/oasst1"

# The stages' own settings, before any library reads them; and no test may reach a hub.
import stages  # noqa: E402, F401

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and lose much when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"

# Some tests check the figures that ship with the embedded recipe. Whoever works with other parameters has others.
ships = pytest.mark.skipif(
    (ROOT / "params.yaml").read_bytes() != RECIPE.read_bytes() and not os.environ.get("CI"),
    reason="params.yaml is not the embedded recipe: its figures are not here",
)

CORPUS = [
    "What is the capital of France? Paris is the capital of France.",
    "Instruct: Output: system user assistant You are a helpful assistant.",
    "How do I boil an egg so that the yolk stays soft? Six minutes in boiling water.",
    "0 1 2 3 4 5 6 7 8 9 10 17 23 + - * / = ? ! . , ; : ' \" ( ) [ ] { }",
]


def byte_level_bpe(special: list[str], vocab_size: int = 600):
    """A GPT-2-style byte-level BPE tokenizer trained on a few sentences, with these special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_llama(folder: Path) -> Path:
    """A tiny Llama with ChatML's special tokens, as SmolLM2 has them (its padding token is its end token)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_phi(folder: Path) -> Path:
    """A tiny Phi whose tokenizer, as phi-2's, has one special token (also its end) and no padding token."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([end]), unk_token=end, bos_token=end, eos_token=end
    )
    config = PhiConfig(
        vocab_size=len(tokenizer) + 8,  # phi-2's embedding has spare rows, too
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # half of a head's 32 numbers are rotated: no fewer would do for the exported model
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    PhiForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, phi: Path) -> Path:
    """A GPT-2, whose linear layers keep their weights transposed (Conv1D), with the tokenizer of `phi`."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(phi)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer) + 8,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, tiny_phi) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "model", tiny_phi)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory) -> Path:
    return save_phi(tmp_path_factory.mktemp("phi") / "model")


def message(message_id: str, parent: str | None = None, role: str = "assistant", **fields) -> dict:
    """A message row in OASST1's flat schema; the tree is the part of the id before the first dot."""
    row = {
        "message_id": message_id,
        "parent_id": parent,
        "message_tree_id": message_id.split(".")[0],
        "tree_state": "ready_for_export",
        "text": f"text of {message_id}",
        "role": role,
        "lang": "en",
        "rank": None,
        "deleted": False,
        "synthetic": False,
        "review_result": True,
        "labels": None,
        "detoxify": None,
    }
    return {**row, **fields}


def small_trees(count: int) -> list[dict]:
    """`count` trees of a question and an answer in two words each, all different."""
    rows = []
    for i in range(count):
        rows.append(message(f"t{i}", role="prompter", text=f"What is {i} + 1?"))
        rows.append(message(f"t{i}.a", f"t{i}", text=f"It is {i + 1}."))
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TINY = {
    "base_model": "file:data/local/tiny",
    "base_model_revision": None,
    "dataset": "file:data/local/trees.jsonl",
    "dataset_revision": None,
    "max_length": 128,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_steps": 2,
    "learning_rate": 0.01,
    "merge_dtype": "float32",
    "bootstrap_samples": 200,
    "stop_prompts": 2,
    "max_new_tokens": 8,
    "export_max_perplexity_increase": 10.0,  # so small a model loses much by 4 bits
}


class Project:
    """A copy of the project's files in a folder and git repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = ["Makefile", "dvc.yaml", ".dvcignore", ".gitignore", "LICENSE", "README.md", "requirements.lock"]
        for name in (
            *tracked,
            "pyproject.toml",
            "stages",
            "space",
            "recipes",
            "data/sample",
            "data/local",
            "models/README.md",
            ".dvc/config",
        ):
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copyfile(source, target)
        shutil.copyfile(RECIPE, folder / "params.yaml")
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit("start")

    def git(self, *args: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *identity, *args], cwd=self.folder, check=True, capture_output=True)

    def commit(self, text: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", text)

    def set(self, **values) -> None:
        """Change keys of params.yaml."""
        from ruamel.yaml import YAML

        yaml, path = YAML(), self.folder / "params.yaml"
        params = yaml.load(path.read_text(encoding="utf-8"))
        params.update(values)
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(params, file)

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a user whose git has no identity."""
        home = self.folder / ".home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "HOME": str(home),
            "GIT_CONFIG_NOSYSTEM": "1",
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            # What activating the environment lends a user whom git does not know (see the Makefile).
            **{f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            **changes,
        }

    def start(self, *command: str, output: int | IO = subprocess.PIPE) -> subprocess.Popen:
        """Start `python -m command` (or `make …`) as the head of a process group, as a terminal does; its errors go to
        its output."""
        return subprocess.Popen(
            command if command[0] == "make" else [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make_environment(self) -> None:
        """What `make setup` would make, without an installation: an environment that is this one."""
        python = self.folder / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        (self.folder / ".venv/installed").touch()

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m command` in the project, without a terminal."""
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and result.returncode:
            raise AssertionError(f"{command} failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
        return result


def make_tiny(project: Project, tiny_llama: Path) -> Project:
    """Give `project` a tiny Llama and 40 small trees, so that a whole `dvc repro` takes a minute."""
    shutil.copytree(tiny_llama, project.folder / "data/local/tiny")
    write_jsonl(project.folder / "data/local/trees.jsonl", small_trees(40))
    project.set(**TINY)
    project.commit("tiny recipe")
    return project


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "a project")  # a space in the path, as some have


@pytest.fixture
def tiny_project(project, tiny_llama) -> Project:
    return make_tiny(project, tiny_llama)

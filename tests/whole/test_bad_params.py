"""Wrong values in params.yaml, as tables: each case is one line that says which key, which value and how to fix it."""

import re

import pytest

from tests.support.project import RECIPE
from tests.support.refused import refused

VALUES = {
    "learning_rate: -1": "learning_rate: -1: must be greater than 0",
    "learning_rate: fast": "learning_rate: 'fast': must be a valid number",
    "learning_rate: .nan": "learning_rate: nan: must be a finite number",
    "learning_rate: .inf": "learning_rate: inf: must be a finite number|less than or equal to 1",
    "learning_rate: '0.1'": "learning_rate: '0.1': must be a valid number",
    "learning_rate:": "learning_rate: None: must be a valid number",
    "max_steps: 2.5": "max_steps: 2.5: must be a valid integer",
    "max_steps: true": "max_steps: True: must be a valid integer",
    "max_steps: 0": "max_steps: 0: must be greater than 0",
    "fp16: yes please": "fp16: 'yes please': must be a valid boolean",
    "fp16: 1": "fp16: 1: must be a valid boolean",
    "optim: adamw": "optim: 'adamw': must be 'paged_adamw_32bit', ",
    "threads: worst": "threads: 'worst': must be 'best' or 'all'",
    "chat_template: my/own.jinja": "chat_template: 'my/own.jinja': must match",
    "chat_template: ../../secret": "chat_template: '../../secret': must match",
    "target_modules: []": "target_modules: []: must have at least 1 item",
    "target_modules: q_proj": "target_modules: 'q_proj': must be a valid list",
    "target_modules: [q_proj, q_proj]": "names something twice",
    "target_modules: [1]": "target_modules.0: 1: must be a valid string",
    "validation_fraction: 0.9": "validation_fraction: 0.9: must be less than or equal to 0.5",
    "validation_fraction: 0": "validation_fraction: 0: must be greater than 0",
    "max_bad_rows: 2": "max_bad_rows: 2: must be less than or equal to 1",
    "lerning_rate: 1": "lerning_rate: is not a parameter",
    "save_steps: 1000": "save_steps: 1000: must be at most max_steps",
    "base_model: nonsense": "base_model: 'nonsense': 'nonsense' must be owner/name",
    "base_model: 5": "base_model: 5: must be a valid string",
    "base_model: microsoft/phi-2": "base_model_revision: 'sha256:",
    "dataset: pypi:package/file": "dataset: 'pypi:package/file'",
    "dataset: data/local/mine.jsonl": "dataset: 'data/local/mine.jsonl': needs file: before it; write file:data/",
    "dataset: file://data/local/mine.jsonl": "without //; write file:data/local/mine.jsonl",
    "dataset: dvc.yaml": "dataset: 'dvc.yaml': a local path needs file: before it; write file:dvc.yaml",
    "base_model: models/local/mine": "base_model: 'models/local/mine': a local path needs file: before it",
    "base_model: ~/models/mine": "write file:~/models/mine",
    "dataset_revision: main": "dataset_revision: 'main'",
    "max_turns: 0": "max_turns: 0: must be greater than 0",
    "seed: 1e400": "seed: ",
    "learning_rate: !!python/object:os.system {}": "is not valid YAML",
    "learning_rate: [1": "is not valid YAML",
    "learning_rate: 1\nlearning_rate: 2": "duplicate key",
    "\ttab: 1": "is not valid YAML",
    "--- another document": "is not valid YAML",
}


@pytest.mark.parametrize("line", VALUES)
def test_a_wrong_parameter(line, folder, capsys):
    text = RECIPE.read_text(encoding="utf-8")
    key = line.split(":")[0]
    text = re.sub(rf"^{re.escape(key)}:.*\n(- .*\n)*", "", text, flags=re.MULTILINE)
    (folder / "params.yaml").write_text(f"{text}{line}\n", encoding="utf-8")
    said = refused("prepare", capsys)
    assert said.startswith("error: params.yaml") and any(words in said for words in VALUES[line].split("|")), said


WHOLE_FILES = {
    "missing": (None, "params.yaml is missing. `make recipe NAME=smollm2-cpu`"),
    "empty": (b"", "params.yaml must hold `key: value` lines"),
    "a list": (b"- 1\n", "params.yaml must hold `key: value` lines"),
    "binary": (b"\xff\xfe\0\x01", "params.yaml is not valid YAML"),
    "merge conflict": (b"<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> x\n", "is not valid YAML"),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_a_parameter_file_that_is_none(case, folder, capsys):
    content, said = WHOLE_FILES[case]
    (folder / "params.yaml").unlink()
    if content is not None:
        (folder / "params.yaml").write_bytes(content)
    assert said in refused("fetch", capsys)


def test_the_table_is_long():
    assert sum(map(len, (VALUES, WHOLE_FILES))) >= 40

"""Bad input, as one table: each case is one line that says what, where and how to fix it, and nothing is half-written.

Every case runs its stage as `python -m stages NAME` does, in this process, over a small project whose earlier outputs
must stay as they are.
"""

import gzip
import importlib
import json
import re
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from stages.common.artifacts import digest_files
from stages.common.entry import run as run_entry
from stages.common.machine import Machine
from tests.support.project import PIPELINE, RECIPE, ROOT, TINY, outputs_of, set_params
from tests.support.rows import message, small_trees, write_jsonl

OLD = "of an earlier run\n"
# What tells a user where to turn: a path or key to correct, or a command to run.
HOW_TO_FIX = re.compile(
    r"dvc repro|make all|in params\.yaml|recipe|Fix|Correct|[Ss]et |Put |[Rr]aise|Move|Choose|[Ll]oosen|Delete|Copy"
    r"|must (be|have|match) |see the table|did you mean |use one of: |write file:"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty project with the small recipe, in which the test runs."""
    shutil.copytree(ROOT / "stages/templates", tmp_path / "stages/templates")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    set_params(tmp_path, **TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(name: str) -> None:
    """A stage, or the command of this name, in this process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_entry(f"{'stages' if name in PIPELINE else 'commands'}.{name}", lock=name)
    finally:
        signal.signal(signal.SIGTERM, before)


def everything_made() -> str:
    return digest_files([Path(name) for name in ("data", "models", "reports") if Path(name).exists()])


def refused(stage: str, capsys) -> str:
    """The stage's one error line; asserts that it exits with 1, and that its earlier outputs are as they were."""
    for name in outputs_of(stage):
        out = Path(name)
        if out.suffix:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(OLD)
        elif not out.exists():
            out.mkdir(parents=True)
            (out / "old").write_text(OLD)
    before = everything_made()
    with pytest.raises(SystemExit) as stopped:
        run(stage)
    said = str(stopped.value.code)  # Python prints it, and exits with 1
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    assert len(said) < 700 and HOW_TO_FIX.search(said), said
    assert "Traceback" not in capsys.readouterr().err
    shutil.rmtree("models/checkpoints", ignore_errors=True)
    assert everything_made() == before
    assert not list(Path(".").rglob(".*.partial"))
    return said


# Raw rows --------------------------------------------------------------------------------------------------------

FILES = {
    "empty file": ("x.jsonl", b"", "hold no rows"),
    "only blank lines": ("x.jsonl", b"\n \n\n", "hold no rows"),
    "HTML error page": ("x.jsonl", b"<!doctype html>\n<html>404</html>\n", "x.jsonl line 1: not valid JSON"),
    "HTML error page, gzipped": ("x.jsonl.gz", gzip.compress(b"<html>404</html>\n"), "x.jsonl.gz line 1: not valid"),
    "one JSON array": ("x.jsonl", b'[{"message_id": "a"}]\n', "x.jsonl line 1: not a JSON object"),
    "pretty-printed JSON": ("x.jsonl", b'{\n "message_id": "a"\n}\n', "x.jsonl line 1: not valid JSON"),
    "UTF-16": ("x.jsonl", '{"message_id": "a"}\n'.encode("utf-16"), "x.jsonl line 1: not UTF-8"),
    "Latin-1": ("x.jsonl", '{"text": "é"}\n'.encode("latin-1"), "x.jsonl line 1: not UTF-8"),
    "CSV named .jsonl": ("x.jsonl", b"message_id,text\na,b\n", "it begins with 'message_id,text'"),
    "only NUL bytes": ("x.jsonl", b"\0" * 4096, "x.jsonl line 1: not valid JSON"),
    "no such file type": ("x.txt", b"a,b\n", "holds no .jsonl"),
    "a git-lfs pointer": ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "line 1: not valid JSON"),
    "not gzip": ("x.jsonl.gz", b"not gzip", "x.jsonl.gz cannot be read"),
    "truncated gzip": ("x.jsonl.gz", gzip.compress(b'{"message_id": "a"}\n' * 99)[:-20], "x.jsonl.gz cannot be read"),
    "damaged gzip": (
        "x.jsonl.gz",
        gzip.compress(b'{"message_id": "a"}\n' * 99)[:20] + b"\xff" * 40,
        "x.jsonl.gz cannot be read",
    ),
    "not parquet": ("x.parquet", b"PAR1 not really", "x.parquet cannot be read"),
    "truncated parquet": ("x.parquet", None, "x.parquet cannot be read"),
    "empty parquet file": ("x.parquet", b"", "x.parquet cannot be read"),
}


def raw_folder(folder: Path) -> Path:
    """The folder of the only data set, as fetch makes it."""
    (folder / "data/raw/1").mkdir(parents=True)
    (folder / "data/raw/source.json").write_text(
        '[{"source": "file:x", "revision": null, "hub": null, "license": null}]'
    )
    return folder / "data/raw/1"


@pytest.mark.parametrize("case", FILES)
def test_a_data_file_that_cannot_be_read(case, folder, capsys):
    name, content, said = FILES[case]
    raw = raw_folder(folder)
    if content is None:
        pd.DataFrame(small_trees(40)).to_parquet(raw / "whole.parquet")
        content = (raw / "whole.parquet").read_bytes()[:-100]
        (raw / "whole.parquet").unlink()
    (raw / name).write_bytes(content)
    assert said in refused("prepare", capsys)


# A row beside 400 good ones, and what is said of it when no bad row is allowed.
BAD_ROWS = {
    "no id": ({"message_id": None}, "message_id is missing"),
    "an id that is a number": ({"message_id": 5}, "message_id is 5, not a string"),
    "an id that is a list": ({"message_id": ["a"]}, "message_id is ['a'], not a string"),
    "no text": ({"text": None}, "text is missing"),
    "a text that is a number": ({"text": 1.5}, "text is 1.5, not a string"),
    "a text that is an object": ({"text": {"en": "hi"}}, "text is {'en': 'hi'}, not a string"),
    "a text of typed blocks": ({"text": [{"type": "text", "text": "hi"}]}, "not a string"),
    "no role": ({"role": None}, "role is missing"),
    "an unknown role": ({"role": "moderator"}, "role is 'moderator', neither"),
    "a role that is a number": ({"role": 1}, "role is 1, not a string"),
    "a role in capitals": ({"role": "Assistant"}, "role is 'Assistant', neither"),
    "a parent that is a number": ({"parent_id": 7}, "parent_id is 7, not a string"),
    "a parent that is a list": ({"parent_id": ["t1"]}, "parent_id is ['t1'], not a string"),
    "a NUL in the text": ({"text": "a\0b"}, "text holds a NUL character"),
    "a NUL in the id": ({"message_id": "a\0"}, "message_id holds a NUL character"),
    "a lone surrogate in the text": ({"text": "a\ud83d"}, "text holds half of a surrogate pair"),
    "a lone surrogate in the id": ({"message_id": "\udc00"}, "message_id holds half of a surrogate pair"),
    "a lone surrogate in the language": ({"lang": "\udfff"}, "lang holds half of a surrogate pair"),
    "a lone surrogate in the tree": ({"message_tree_id": "\ud800"}, "message_tree_id holds half"),
    "missing columns": (b'{"a": 1}', "unknown form"),
    "an empty object": (b"{}", "unknown form"),
    "an array": (b"[1, 2]", "not a JSON object"),
    "a bare text": (b'"hello"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "a line cut off": (b'{"message_id": "x", "te', "not valid JSON"),
    "two objects on a line": (b'{"a": 1} {"a": 2}', "not valid JSON (Extra data)"),
    "single quotes": (b"{'message_id': 'x'}", "not valid JSON"),
    "bytes that are no UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "brackets without end": (b"[" * 200_000, "not JSON that can be read"),
    "a number without end": (b'{"rank": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "an empty conversation": (b'{"messages": []}', "text is missing"),
    "a conversation of texts": (b'{"messages": ["hi", "yo"]}', "role is missing|text is missing"),
    "an answer that is no text": (b'{"instruction": "add", "output": 3}', "text is 3, not a string"),
    "a tree without a message": (b'{"prompt": {}, "message_tree_id": "x"}', "message_id is missing"),
    "replies that are texts": (
        b'{"prompt": {"message_id": "x", "text": "?", "role": "prompter", "replies": ["yes"]}}',
        "message_id is missing",
    ),
}


def write_row(path, row) -> None:
    line = row if isinstance(row, bytes) else json.dumps(message("bad", role="prompter", text="?") | row).encode()
    path.write_bytes(path.read_bytes() + line + b"\n")


@pytest.fixture
def good_rows(folder):
    path = write_jsonl(raw_folder(folder) / "x.jsonl", small_trees(200))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_counted_and_skipped_up_to_the_bound(case, folder, good_rows, capsys):
    row, said = BAD_ROWS[case]
    write_row(good_rows, row)
    run("prepare")
    funnel = json.loads((folder / "reports/funnel.json").read_text(encoding="utf-8"))
    assert 1 <= funnel["dropped"]["bad_row"]["messages"] <= 2
    assert sum(split["conversations"] for split in funnel["kept"].values()) == 200
    shutil.rmtree(folder / "data/prepared")
    set_params(folder, max_bad_rows=0)
    line = refused("prepare", capsys)
    assert "x.jsonl line 401: " in line and any(words in line for words in said.split("|")), line
    assert "file:x: 1 of 401 rows cannot be used, more than max_bad_rows, 0" in line


# Rows that are odd, but no reason to stop, however many there are: what the funnel says of them.
ODD_ROWS = {
    "a self-parent": ([message("s", "s", role="prompter")], "orphan"),
    "a cycle": ([message("a", "b", role="prompter"), message("b", "a")], "orphan"),
    "a parent that is nowhere": ([message("a.1", "a")], "orphan"),
    "an id twice": ([message("t0", role="prompter", text="other")], "duplicate_id"),
    "an empty text": ([message("a", role="prompter", text="")], "empty"),
    "white space": ([message("a", role="prompter", text=" \n\t")], "empty"),
    "an assistant who begins": ([message("a")], "wrong_role"),
    "a question without answer": ([message("a", role="prompter")], "unanswered_question"),
    "a rank that is a text": ([message("a", role="prompter", rank="first")], "unanswered_question"),
    "a rank beyond floats": ([message("a", role="prompter", rank=10**400)], "unanswered_question"),
    "labels that are a list": ([message("a", role="prompter", labels=["spam"])], "unanswered_question"),
    "labels of odd types": (
        [message("a", role="prompter", labels={"name": 1, "value": "x"})],
        "unanswered_question",
    ),
    "a quality that is a text": (
        [message("a", role="prompter", labels={"quality": {"value": "high"}})],
        "unanswered_question",
    ),
    "a toxicity that is a list": ([message("a", role="prompter", detoxify={"toxicity": [1]})], "unanswered_question"),
    "a flag that is a text": ([message("a", role="prompter", deleted="no")], "unanswered_question"),
    "a language that is a number": ([message("a", role="prompter", lang=3)], "unanswered_question"),
    "unknown columns": ([message("a", role="prompter", colour="blue")], "unanswered_question"),
}


@pytest.mark.parametrize("case", ODD_ROWS)
def test_an_odd_row_is_counted_and_stops_nothing(case, folder, good_rows):
    rows, reason = ODD_ROWS[case]
    for row in rows:
        write_row(good_rows, row)
    set_params(folder, max_bad_rows=0)
    run("prepare")
    funnel = json.loads((folder / "reports/funnel.json").read_text(encoding="utf-8"))
    assert funnel["dropped"][reason]["messages"] == len(rows)
    assert sum(split["conversations"] for split in funnel["kept"].values()) == 200


def test_huge_messages_a_byte_order_mark_and_mixed_schemas_are_read(folder, good_rows):
    huge = "word " * 200_000  # 1 MB
    rows = [
        *(message("h", role="prompter", text=huge), message("h.a", "h", text=huge)),
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"instruction": "add", "output": "3"},
        {"message_tree_id": "n", "prompt": message("n", role="prompter") | {"replies": [message("n.a", "n")]}},
    ]
    for row in rows:
        write_row(good_rows, json.dumps(row).encode())
    good_rows.write_bytes(b"\xef\xbb\xbf" + good_rows.read_bytes())
    set_params(folder, max_bad_rows=0)
    run("prepare")
    prepared = pd.concat(
        pd.read_parquet(folder / f"data/prepared/{split}.parquet") for split in ("train", "validation")
    )
    assert len(prepared) == 204
    assert max(len(m["content"]) for messages in prepared["messages"] for m in messages) > 900_000


# Parameters ------------------------------------------------------------------------------------------------------

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


# Models ----------------------------------------------------------------------------------------------------------


def edit_json(path, **values) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(values)
    path.write_text(json.dumps(content), encoding="utf-8")


def truncate(path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def pickled(model) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def sharded(model) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS = {
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "a config that is no JSON": (lambda m: (m / "config.json").write_text("{"), "holds no model of a known type"),
    "an empty config": (lambda m: (m / "config.json").write_text("{}"), "holds no model of a known type"),
    "a config of an unknown type": (lambda m: edit_json(m / "config.json", model_type="new"), "model of a known type"),
    "a config with remote code": (
        lambda m: edit_json(m / "config.json", model_type="new", auto_map={"AutoConfig": "evil.Config"}),
        "code of a model's repository is never run",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no *.safetensors"),
    "pickled weights": (pickled, "pickled weights (.bin) are never loaded"),
    "a missing shard": (sharded, "model-00002-of-00002.safetensors is missing"),
    "an index that is no JSON": (
        lambda m: (m / "model.safetensors.index.json").write_text("{"),
        "is not valid JSON",
    ),
    "an index of nothing": (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "truncated weights": (lambda m: truncate(m / "model.safetensors"), "model.safetensors is damaged"),
    "weights cut to their header": (lambda m: truncate(m / "model.safetensors", 0.001), "model.safetensors is damaged"),
    "empty weights": (lambda m: truncate(m / "model.safetensors", 0), "model.safetensors is damaged"),
    "an HTML page as weights": (lambda m: (m / "model.safetensors").write_text("<html>404</html>"), "is damaged"),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "has no tokenizer*.json"),
    "a tokenizer that is no JSON": (lambda m: (m / "tokenizer.json").write_text("{"), "no tokenizer that can be read"),
    "a damaged GGUF": (lambda m: (m / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 60), "no GGUF model that can be"),
    "two GGUFs": (lambda m: [(m / f"{n}.gguf").write_bytes(b"GGUF") for n in "ab"], "2 GGUF files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_used_is_refused_when_it_is_fetched(case, folder, tiny_llama, capsys):
    damage, said = MODELS[case]
    damage(shutil.copytree(tiny_llama, folder / "models/local/tiny"))
    line = refused("fetch_model", capsys)
    assert said in line and ".partial" not in line, line


LOCAL = {
    "no data": ("fetch", {"dataset": "file:data/local/none.jsonl"}, "data/local/none.jsonl does not exist. Correct"),
    "a name misspelt": ("fetch", {"dataset": "file:data/local/tree.jsonl"}, "exist. Did you mean trees.jsonl? Correct"),
    "no model": ("fetch_model", {"base_model": "file:models/local/none"}, "models/local/none does not exist"),
    "a file outside": ("fetch", {"dataset": "file:params.yaml"}, "is outside data/local"),
    "a model beside the data": ("fetch_model", {"base_model": "file:data/local/model"}, "is outside models/local"),
    "another version": ("fetch", {"dataset_revision": "sha256:" + "0" * 64}, "is not the pinned sha256:000"),
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_source_that_is_not_as_named(case, folder, tiny_llama, capsys):
    stage, changes, said = LOCAL[case]
    for path in ("models/local/tiny", "data/local/model"):
        shutil.copytree(tiny_llama, folder / path)
    write_jsonl(folder / "data/local/trees.jsonl", small_trees(2))
    set_params(folder, **changes)
    assert said in refused(stage, capsys)


# What a stage finds of the stages before it ----------------------------------------------------------------------


@pytest.fixture
def made(finished, tmp_path, monkeypatch):
    """A copy of the finished project, in which the test runs."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns(".git", ".dvc", ".home"))
    monkeypatch.chdir(folder)
    return folder


def other_vocabulary(base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{i}>" for i in range(5000)])
    tokenizer.save_pretrained(base)


def without_a_weight(file) -> None:
    weights = load_file(file)
    weights.pop(sorted(weights)[-1])
    save_file(weights, file, metadata={"format": "pt"})


def with_infinite_norm(file) -> None:
    weights = load_file(file)
    weights["model.norm.weight"].fill_(float("inf"))
    save_file(weights, file, metadata={"format": "pt"})


def unpickled(adapter) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def of_another_base(adapter) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({n: w.repeat(1, 2) if "lora_A" in n else w for n, w in load_file(file).items()}, file)


def unlink(name):
    return lambda p: (p / name).unlink()


def rewrite(name, content):
    return lambda p: (p / name).write_text(content)


def drop_column(name, column):
    return lambda p: pd.read_parquet(p / name).drop(columns=column).to_parquet(p / name)


def no_rows(name):
    return lambda p: pd.read_parquet(p / name).head(0).to_parquet(p / name)


PREPARED, TOKENIZED = "data/prepared/train.parquet", "data/tokenized/validation.parquet"
STATES = {
    "sources, no list": ("prepare", rewrite("data/raw/source.json", "{}"), "is not as fetch writes it"),
    "sources, of nothing": ("prepare", rewrite("data/raw/source.json", "[{}]"), "is not as fetch writes it"),
    "prepared, its params a list": ("tokenize", rewrite("data/prepared/params.json", "[]"), "holds no JSON object"),
    "tokens, their params a list": ("train", rewrite("data/tokenized/params.json", "[]"), "holds no JSON object"),
    "base, numbers that are none": (
        "train",
        lambda p: with_infinite_norm(p / "models/base/model.safetensors"),
        "logits are not finite in this number format, before any training",
    ),
    "prepared, gone": ("tokenize", unlink(PREPARED), "train.parquet is missing"),
    "prepared, edited": ("tokenize", rewrite(PREPARED, "x"), "train.parquet cannot be read"),
    "prepared, without a column": ("tokenize", drop_column(PREPARED, "trained"), "has no trained"),
    "prepared, without rows": ("tokenize", no_rows(PREPARED), "has no rows"),
    "prepared, its params gone": ("tokenize", unlink("data/prepared/params.json"), "params.json is missing"),
    "base, its tokenizer edited": ("tokenize", rewrite("models/base/tokenizer.json", "{}"), "holds no tokenizer"),
    "base, its config gone": ("tokenize", unlink("models/base/config.json"), "no model of a known type"),
    "another vocabulary": ("tokenize", lambda p: other_vocabulary(p / "models/base"), "they do not fit"),
    "too short a model": ("tokenize", lambda p: set_params(p, max_length=4096), "reads at most 512 tokens"),
    "no such template": ("tokenize", lambda p: set_params(p, chat_template="none"), "none.jinja does not exist"),
    "a template without marks": (
        "tokenize",
        lambda p: (rewrite("stages/templates/bare.jinja", "{{ messages }}")(p), set_params(p, chat_template="bare")),
        "generation %} marks",
    ),
    "tokens, gone": ("train", unlink("data/tokenized/train.parquet"), "train.parquet is missing"),
    "tokens, without a column": ("train", drop_column(TOKENIZED, "length"), "has no length"),
    "their tokenizer gone": (
        "train",
        lambda p: shutil.rmtree(p / "data/tokenized/tokenizer"),
        "holds no tokenizer",
    ),
    "their params edited": ("train", rewrite("data/tokenized/params.json", "[1"), "is not valid JSON"),
    "a layer that is none": ("train", lambda p: set_params(p, target_modules=["fc9"]), "the base model has no fc9"),
    "base, truncated": ("train", lambda p: truncate(p / "models/base/model.safetensors"), "is damaged"),
    "base, weights gone": ("train", unlink("models/base/model.safetensors"), "cannot be loaded"),
    "base, a weight lacking": (
        "train",
        lambda p: without_a_weight(p / "models/base/model.safetensors"),
        "weights are missing",
    ),
    "base, of other sizes": (
        "train",
        lambda p: edit_json(p / "models/base/config.json", intermediate_size=96),
        "by config.json [64, 96]: they belong to two models",
    ),
    "adapter, its record gone": ("merge", unlink("models/adapter/training.json"), "training.json is missing"),
    "adapter, its record edited": ("merge", rewrite("models/adapter/training.json", "{}"), "has no params"),
    "adapter, gone": ("merge", unlink("models/adapter/adapter_model.safetensors"), "pickled weights (.bin) are never"),
    "adapter, pickled": ("merge", lambda p: unpickled(p / "models/adapter"), "pickled weights (.bin) are never"),
    "adapter, truncated": (
        "merge",
        lambda p: truncate(p / "models/adapter/adapter_model.safetensors"),
        "does not fit models/base",
    ),
    "adapter, a weight lacking": (
        "merge",
        lambda p: without_a_weight(p / "models/adapter/adapter_model.safetensors"),
        "does not fit models/base (only one",
    ),
    "adapter, of another base": ("merge", lambda p: of_another_base(p / "models/adapter"), "does not fit models/base"),
    "adapter, its config edited": (
        "merge",
        rewrite("models/adapter/adapter_config.json", "{}"),
        "does not fit models/base",
    ),
    "its source edited": ("merge", rewrite("data/raw/source.json", "none"), "source.json is not valid JSON"),
    "merged, truncated": ("evaluate", lambda p: truncate(p / "models/merged/model.safetensors"), "is damaged"),
    "merged, gone": ("evaluate", lambda p: shutil.rmtree(p / "models/merged"), "models/merged holds no model"),
    "held-out part, without a column": ("evaluate", drop_column(TOKENIZED, "lang"), "has no lang"),
    "export: merged, gone": ("export", lambda p: shutil.rmtree(p / "models/merged"), "holds no tokenizer"),
    "export: merged, truncated": ("export", lambda p: truncate(p / "models/merged/model.safetensors"), "is damaged"),
    "export: held-out part, without a column": ("export", drop_column(TOKENIZED, "length"), "has no length"),
    "figures, edited": ("summary", rewrite("reports/evaluation.json", "{}"), "has no held_out"),
    "figures, gone": ("summary", unlink("reports/evaluation.json"), "evaluation.json is missing"),
    "figures of the export, gone": ("summary", unlink("reports/exported.json"), "exported.json is missing"),
    "samples, gone": ("summary", unlink("reports/samples.json"), "samples.json is missing"),
    "no run yet": ("summary", unlink("dvc.lock"), "nothing was made yet"),
    "dvc.lock, cut off": ("summary", rewrite("dvc.lock", "schema: '2.0'\nstages: {a: ["), "dvc.lock is damaged"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES)
def test_what_a_stage_finds_of_the_stages_before_it(case, made, capsys):
    stage, damage, said = STATES[case]
    damage(made)
    line = refused(stage, capsys)
    assert said in line, line


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, said", [("train", "adapter take"), ("merge", "merging takes"), ("export", "exporting takes at least")]
)
def test_a_stage_that_the_machine_cannot_do_says_so_first(stage, said, made, monkeypatch, capsys):
    small = Machine(cores=2, memory=64 << 20, disk=1 << 40, gpu=None)
    monkeypatch.setattr(importlib.import_module(f"stages.{stage}"), "this_machine", lambda: small)
    line = refused(stage, capsys)
    assert said in line and "and this machine has 0.1 GiB" in line


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which trains in float16")
def test_the_reference_recipes_precision_is_refused_without_a_gpu(made, capsys):
    set_params(made, fp16=True)
    assert refused("train", capsys).startswith("error: fp16: true: needs a CUDA GPU")


def test_the_table_is_long():
    tables = (FILES, BAD_ROWS, ODD_ROWS, VALUES, WHOLE_FILES, MODELS, LOCAL, STATES)
    assert sum(map(len, tables)) >= 150

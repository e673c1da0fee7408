"""`make check`: what it shows of a file or folder is what prepare and tokenize make of it, and it touches nothing."""

import importlib
import json
import re
import shutil
import sys

import pandas as pd
import pytest

from commands import check
from stages.common.artifacts import digest_files
from stages.common.errors import StageError
from tests.support.project import ROOT, set_params
from tests.support.rows import write_jsonl


def talk(question: str, answer: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


ROWS = [
    *(talk(f"What is {i} + 1?", f"It is {i + 1}.", source="me") for i in range(40)),
    *(talk(f"Was ist {i} + 1?", f"Das ist {i + 1}.", lang="de") for i in range(4)),
    talk("what is  3 + 1?", "It is 4."),  # a copy
    talk("Tell me all.", "word " * 200),  # too long
    {"instruction": "Hi", "output": "Yo"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama):
    """A project with a base model and a data file, in which the test runs."""
    shutil.copytree(ROOT / "stages/templates", tmp_path / "stages/templates")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    shutil.copytree(tiny_llama, tmp_path / "models/base")
    record = {"source": "file:models/local/tiny", "revision": None, "hub": None, "license": None}
    (tmp_path / "models/base/source.json").write_text(json.dumps(record))
    write_jsonl(tmp_path / "data/local/mine.jsonl", ROWS)
    set_params(
        tmp_path,
        base_model=record["source"],
        base_model_revision=None,
        dataset="file:data/local/mine.jsonl",
        dataset_revision=None,
        max_length=128,
        validation_fraction=0.24,
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, *arguments: str) -> str:
    """What the command prints."""
    monkeypatch.setattr(sys, "argv", ["check", *arguments])
    check.main()
    return capsys.readouterr().out


def lines(said: str) -> dict[str, list[str]]:
    """The labelled lines, by label."""
    found: dict[str, list[str]] = {}
    for line in said.partition("\nThe first")[0].splitlines()[2:]:
        found.setdefault(line[:14].strip(), []).append(line[14:])
    return found


def test_everything_that_is_shown(folder, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "data/local/mine.jsonl")
    shown = lines(said)
    assert shown["form"] == ["messages: 46 rows, instruction: 1 rows"]
    assert shown["read"] == ["94 messages in 47 trees"]
    assert shown["languages"] == ["unknown 43, de 4"]
    assert "columns that are not read: source (40 rows)" in shown["note"]
    assert shown["dropped"] == [
        "8 messages: language (parameter languages)",
        "2 messages (1 conversations): duplicate_conversation",
        "1 conversations: too_long (parameter max_length)",
    ]
    assert shown["kept"] == ["41 conversations: 31 to train on, 10 held out (24.4%)"]
    assert re.fullmatch(r"tokens: median \d+, 95 % up to \d+, longest \d{3,}", shown["lengths"][0])
    assert "max_steps: 24" in said.partition("To train on it")[2]  # three passes of 31, 4 a step


def test_it_shows_what_the_stages_make(folder, monkeypatch, capsys):
    """Counts and marked tokens are those of data/tokenized/."""
    said = run(monkeypatch, capsys, "data/local/mine.jsonl")
    shutil.copytree(folder / "data/local", folder / "data/raw/1")
    source = {"source": "file:data/local/mine.jsonl", "revision": None, "hub": None, "license": None}
    (folder / "data/raw/source.json").write_text(json.dumps([source]))
    for stage in ("prepare", "tokenize"):
        importlib.import_module(f"stages.{stage}").main()
    capsys.readouterr()
    counts = json.loads((folder / "reports/tokens.json").read_text())
    splits = {name: pd.read_parquet(folder / f"data/tokenized/{name}.parquet") for name in ("train", "validation")}
    supervised = sum(counts[name]["supervised_tokens"] for name in splits)
    assert lines(said)["trained on"][0].startswith(f"{supervised} of ")
    kept = sum(len(frame) for frame in splits.values())
    assert lines(said)["kept"][0].startswith(f"{kept} conversations: ")
    first = said.partition("  -- 1, ")[2].partition("  -- 2, ")[0]
    assert first.count("⟦") == first.count("⟧") == 1
    assert first.partition("⟦")[2].partition("⟧")[0] == "It is 1.<|im_end|>"
    assert said.count("  -- ") == 3


def test_nothing_is_written(folder, monkeypatch, capsys):
    before = digest_files([folder])
    run(monkeypatch, capsys, "data/local/mine.jsonl")
    assert digest_files([folder]) == before


def test_colour_on_a_terminal_and_brackets_elsewhere(folder, monkeypatch, capsys):
    assert "\033[" not in run(monkeypatch, capsys, "data/local/mine.jsonl")
    monkeypatch.setattr(check, "in_colour", lambda: True)
    said = run(monkeypatch, capsys, "data/local/mine.jsonl")
    assert "\033[1;32mIt is 1.<|im_end|>\033[0m" in said and "⟦" not in said


def test_without_a_base_model_lengths_are_characters(folder, monkeypatch, capsys):
    shutil.rmtree(folder / "models")
    said = run(monkeypatch, capsys, "data/local/mine.jsonl")
    assert "characters: median" in said and "dvc repro fetch_model" in said
    assert "assistant: ⟦It is 1.⟧" in said


def test_another_models_tokenizer_does_not_count(folder, monkeypatch, capsys):
    set_params(folder, base_model="file:models/local/other")
    assert "characters: median" in run(monkeypatch, capsys, "data/local/mine.jsonl")


def test_where_nothing_fits_what_took_it_is_shown_first(folder, monkeypatch, capsys):
    set_params(folder, max_length=16, system_prompt="word " * 50)
    with pytest.raises(StageError, match="no conversation of train is left"):
        run(monkeypatch, capsys, "data/local/mine.jsonl")
    assert lines(capsys.readouterr().out)["dropped"][-1] == "42 conversations: too_long (parameter max_length)"


def test_a_folder_elsewhere_gets_its_pin(folder, monkeypatch, capsys, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_jsonl(elsewhere / "sub/train.jsonl", ROWS[:30])
    write_jsonl(elsewhere / "sub/valid.jsonl", ROWS[30:40])
    said = run(monkeypatch, capsys, f"file:{elsewhere}")
    assert "held out: sub/valid.jsonl" in said and "trained on: sub/train.jsonl" in said
    assert lines(said)["kept"] == ["40 conversations: 30 to train on, 10 held out (25.0%)"]
    assert f"dataset: file:{elsewhere}\n  dataset_revision: sha256:{digest_files([elsewhere])}\n" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "name a file or folder: make check DATA=data/local/mine.jsonl"),
        (("",), "name a file or folder"),
        (("data/local/none.jsonl",), "data/local/none.jsonl does not exist. Correct DATA"),
        (("dvc.yaml",), "dvc.yaml holds no .jsonl"),
        (("data/local/bad.jsonl",), "data/local/bad.jsonl: 1 of 2 rows cannot be used"),
        (("data/local/two.jsonl",), "no conversation is left for validation: of 1 trees, 1 passed all steps"),
    ],
)
def test_what_cannot_be_checked_is_one_line(arguments, said, folder, monkeypatch, capsys):
    write_jsonl(folder / "data/local/bad.jsonl", [ROWS[0], {"what": "ever"}])
    write_jsonl(folder / "data/local/two.jsonl", ROWS[:1])
    with pytest.raises(StageError, match=re.escape(said)) as caught:
        run(monkeypatch, capsys, *arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_a_long_text_is_shown_without_its_middle():
    text = "a" * 400 + "b" * 400
    assert check.shortened(text) == "a" * 300 + " … (200 characters) … " + "b" * 300
    assert check.shortened("a" * 600) == "a" * 600

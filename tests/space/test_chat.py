"""The terminal chat: questions in, answers out; commands; Ctrl-C stops an answer and not the chat."""

import os
import signal
import subprocess
import sys

import pytest

from chat import print_answer, summary
from chatapp.engine import Chunk, Sampling
from chatapp.word_wrap import WordWrap
from tests.support.project import ROOT
from tests.support.serving import Scripted

CHAT = [sys.executable, str(ROOT / "space/chat.py")]


@pytest.mark.slow
def test_a_conversation_with_commands(exported_llama):
    typed = "Hello!\nAnd then?\n/reset\nHello!\n/system Be brief.\nHello!\n/what\n\n/quit\nnever read\n"
    result = subprocess.run(
        [*CHAT, "--model", str(exported_llama.folder), "--seed", "1", "--max-tokens", "12"],
        input=typed,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stderr == ""
    answers = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == 4 and all("a second" in line for line in answers)
    assert "from the cache" in answers[1]
    assert "A new conversation.\n" in result.stdout and "with this system message" in result.stdout
    assert result.stdout.count("/reset begins") == 2 and "never read" not in result.stdout


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(exported_llama):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [*CHAT, "--model", str(exported_llama.folder), "--seed", "1", "--max-tokens", "400", "--temperature", "2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"Hello!\n")
        process.stdin.flush()
        while not process.stdout.read(1) == b">":
            pass
        process.stdout.read(8)  # the answer has begun
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(b"/quit\n", timeout=60)
    assert process.returncode == 0 and errors == b""
    assert b"stopped]" in rest


def test_nothing_exported_and_wrong_settings_are_one_line(tmp_path):
    result = subprocess.run([*CHAT, "--model", str(tmp_path / "none")], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.endswith("Run `make all` to export one.\n")
    result = subprocess.run([*CHAT, "--temperature", "-1"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "error: temperature must be a number from 0 to 5\n"


def test_a_missing_model_names_those_that_are_there(tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/card.json").write_text("{}")
    result = subprocess.run([*CHAT, "--model", str(tmp_path / "base")], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.endswith("base is no exported model, there are: tuned. Use one of them.\n")


def wrapped(pieces: list[str], width: int) -> list[str]:
    """What a terminal gets after each piece, and at the end."""
    wrap = WordWrap(width)
    return [*map(wrap.add, pieces), wrap.finish()]


def test_lines_break_between_words():
    text = "The quick brown fox jumps over the lazy dog.\n\n    four spaces\n1. one"
    for size in (1, 2, 5, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        lines = "".join(wrapped(pieces, 16)).split("\n")
        assert lines == ["The quick brown", "fox jumps over", "the lazy dog.", "", "    four spaces", "1. one"]
    assert wrapped(["one t", "wo thr", "ee"], 7) == ["one", " two", "", "\nthree"]  # a word waits for its end
    assert "".join(wrapped(["a " + "x" * 9 + " b"], 4)) == "a\n" + "x" * 9 + " b"  # which the terminal breaks
    assert "".join(wrapped(["你好世界"], 4)) == "你好\n世界"  # wide, and without spaces


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_wrapped_lines_and_a_pipe_the_text(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "20")
    text = "one two three four five six seven"
    assert print_answer(Scripted(text, {}), [], Sampling()) == text
    said = capsys.readouterr().out.partition("\n[")[0]
    assert said == (text.replace(" five", "\nfive") if terminal else text)


@pytest.mark.slow
def test_the_chat_is_headed_by_the_models_name(tiny_models):
    for name in ("tuned", "base"):
        command = [*CHAT, "--model", str(tiny_models / name)]
        result = subprocess.run(command, input="/quit\n", capture_output=True, text=True)
        assert result.stdout.startswith(f"tiny, {name}\n")


def test_make_chat_takes_the_name_of_a_model():
    for words, name in (([], "tuned"), (["MODEL=base"], "base")):
        command = ["make", "--dry-run", "--old-file=setup", "chat", *words]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"--model models/onnx/{name}\n" in result.stdout


def test_the_line_below_an_answer():
    said = summary(Chunk("", 30, "length", dropped_turns=2, prompt_tokens=100, reused_tokens=80), 2.0)
    for part in ("30 tokens, 15 a second", "80 of 100 prompt tokens", "2 turn(s)", "--max-tokens"):
        assert part in said
    assert summary(Chunk("", 3, "cancelled"), 1.0) == "[3 tokens, 3 a second; stopped]"

"""The terminal chat: questions in, answers out; commands; Ctrl-C stops an answer and not the chat."""

import os
import signal
import subprocess
import sys

import pytest

from chat import summary
from chatapp.engine import Chunk
from tests.support.project import ROOT

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


def test_the_line_below_an_answer():
    said = summary(Chunk("", 30, "length", dropped_turns=2, prompt_tokens=100, reused_tokens=80), 2.0)
    for part in ("30 tokens, 15 a second", "80 of 100 prompt tokens", "2 turn(s)", "--max-tokens"):
        assert part in said
    assert summary(Chunk("", 3, "cancelled"), 1.0) == "[3 tokens, 3 a second; stopped]"

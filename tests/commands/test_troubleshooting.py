"""docs/troubleshooting.md: every error line of the code is in a table, and every row is a line of the code."""

import re

import pytest

from tests.support.messages import messages
from tests.support.project import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
OTHER_PROGRAMS = "(DVC)"  # ends a row of another program's line
MIN_LENGTH = 8  # characters of a row's words: fewer would match anything

SOURCE = " ".join(
    path.read_text(encoding="utf-8")
    for path in sorted(
        [*(p for f in ("stages", "commands", "space") for p in (ROOT / f).rglob("*.py")), ROOT / "Makefile"]
    )
)


def rows() -> list[str]:
    """The words of each error line in the tables: the parts of the first column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line.removeprefix("| "))[0] for line in lines]
    return [part.strip() for cell in cells if cell not in ("error line", "---") for part in cell.split("<br>")]


def pattern(words: str) -> re.Pattern[str]:
    """What a row's words match in a line: … stands for anything."""
    return re.compile(".*".join(re.escape(part) for part in words.split("…")))


ROWS, MESSAGES = rows(), messages()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.where)
def test_every_error_line_is_in_a_table(message):
    assert any(pattern(words).search(message.words) for words in ROWS), (
        f"add a row to docs/troubleshooting.md for the error of {message.where}:\n"
        f"| {message.words} | what it means | what to do |"
    )


@pytest.mark.parametrize("words", ROWS)
def test_every_row_is_an_error_line(words):
    assert len(words.replace("…", "")) >= MIN_LENGTH, f"too short to find a line by: {words!r}"
    found = any(pattern(words).search(message.words) for message in MESSAGES)
    assert found or is_in_the_source(words) or words.endswith(OTHER_PROGRAMS), (
        f"no error line has these words any more, remove or correct the row of docs/troubleshooting.md: {words}"
    )


def is_in_the_source(words: str) -> bool:
    """Whether a line that is no exception's is printed with these words: its fixed parts stand in the code."""
    return all(part.strip() in SOURCE for part in words.split("…"))


def test_each_row_says_what_it_means_and_what_to_do():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            assert len(re.split(r"(?<!\\)\|", line.strip("|"))) == 3, line

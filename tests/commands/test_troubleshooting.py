"""docs/troubleshooting.md: every error line of the code is in a table, and every row is a line of the code."""

import re

import pytest

from stages.common.errors import StageError
from stages.common.params import read_params
from tests.support.messages import messages, texts, texts_of
from tests.support.project import ROOT, set_params

PAGE = ROOT / "docs/troubleshooting.md"
OTHER_PROGRAMS = "(DVC)"  # ends a row of another program's line
WRONG_VALUE = "params.yaml: …: must be …"  # put together of pydantic's words when a value is read
MIN_LENGTH = 8  # characters of a row's words: fewer would match anything


def rows() -> list[str]:
    """The words of each error line in the tables: the parts of the first column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line.removeprefix("| "))[0] for line in lines]
    return [part.strip() for cell in cells if cell not in ("error line", "---") for part in cell.split("<br>")]


def pattern(words: str) -> re.Pattern[str]:
    """What a row's words match in a line: … stands for anything."""
    return re.compile(".*".join(re.escape(part) for part in words.split("…")))


ROWS, MESSAGES, TEXTS = rows(), messages(), texts()


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
    found = found or words.endswith(OTHER_PROGRAMS) or words == WRONG_VALUE
    assert found or is_in_the_source(words), (
        f"no error line has these words any more, remove or correct the row of docs/troubleshooting.md: {words}"
    )


def is_in_the_source(words: str) -> bool:
    """Whether a line that is no exception's is printed with these words: one text has all its fixed parts."""
    return any(pattern(words).search(text) for text in TEXTS)


def test_the_line_of_a_wrong_value_has_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_params(tmp_path, seed="none")
    with pytest.raises(StageError, match=pattern(WRONG_VALUE)):
        read_params()
    assert WRONG_VALUE in ROWS


def test_a_comment_a_docstring_or_the_parts_of_several_texts_are_no_line(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(
        '"""Words of a module."""\n# Words of a comment.\n\ndef f(x):\n    """Words of a function."""\n'
        '    print("Words of ", "two texts.")\n    print(f"Words of {x:.1f} in " "one text.")\n'
    )
    assert texts_of(path) == ["Words of ", "two texts.", "Words of … in one text."]


def test_each_row_says_what_it_means_and_what_to_do():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            assert len(re.split(r"(?<!\\)\|", line.strip("|"))) == 3, line

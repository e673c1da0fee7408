"""The pages of the documentation, for tests: their text, their blocks, and the commands that they name."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.support.project import ROOT

README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/README.md"), ROOT / "models/README.md"])
INVENTED = {"judge"}  # a stage that a reader of docs/contributing.md would add
EXAMPLES = {
    "data/local/mine.jsonl",
    "data/local/mine.jsonl.dvc",
    "data/local/conversations.jsonl",
    "models/local/mine",
    "stages/judge.py",
    "tests/stages/test_judge.py",
    "owner/name",
    "owner/name/path/in/repository",
    "user/name",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def split(line: str) -> list[list[str]]:
    """The commands of a shell line, as words, without comments."""
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set(";&|"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


class Command(NamedTuple):
    """A command as a page names it: its words."""

    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    """All commands of bash blocks, and those in code spans that begin as the project's commands do."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                found += [Command(name, words) for words in split(line)]
        for span in re.findall(r"`((?:make|dvc|python -m|pytest) [^`]+)`", prose(page)):
            if "…" not in span:
                found += [Command(name, words) for words in split(span)]
    return found


COMMANDS = commands()


def of(program: str) -> list[Command]:
    return [command for command in COMMANDS if command.words[0] == program]

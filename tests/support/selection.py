"""Which tests a pytest command selects, for many commands in one collection.

Run: `python -m tests.support.selection` with the commands' options as JSON on its input; it prints the counts as JSON.
"""

import argparse
import io
import json
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import KeywordMatcher, MarkMatcher
from _pytest.mark.expression import Expression

from tests.support.project import ROOT

MODULE = "tests.support.selection"


@dataclass(frozen=True)
class Selection:
    """The options of a pytest command: `-k`, `-m` (without it, that of pyproject.toml) and paths."""

    text: str
    keywords: str
    marks: str
    paths: tuple[str, ...]

    @classmethod
    def of(cls, options: str) -> "Selection":
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("-k", default="")
        parser.add_argument("-m", default="not long")
        parser.add_argument("paths", nargs="*")
        given = parser.parse_args(shlex.split(options))
        return cls(options, given.k, given.m, tuple(given.paths))

    def takes(self, item: pytest.Item) -> bool:
        return (
            (not self.paths or any(item.nodeid.startswith(path) for path in self.paths))
            and (not self.keywords or Expression.compile(self.keywords).evaluate(KeywordMatcher.from_item(item)))
            and Expression.compile(self.marks).evaluate(MarkMatcher.from_markers(item.iter_markers()))
        )


def select(selections: list[Selection], python: Path) -> dict[str, int]:
    """How many tests each command selects, by its text. They are collected in a process of `python`."""
    command = [python, "-m", MODULE]
    asked = json.dumps([asdict(selection) for selection in selections])
    result = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


class Collected:
    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def main() -> None:
    asked: list[dict[str, Any]] = json.load(sys.stdin)
    collected = Collected()
    with redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-p", "no:cacheprovider", "-m", ""], plugins=[collected])
    if status:
        sys.exit(said.getvalue())
    selections = [Selection(**{**fields, "paths": tuple(fields["paths"])}) for fields in asked]
    print(json.dumps({s.text: sum(map(s.takes, collected.items)) for s in selections}))


if __name__ == "__main__":
    main()

"""The error lines of the project, read from its source: what a user may see instead of a result."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.project import ROOT

# Where lines for users are made. Others raise a ValueError for their callers alone.
RAISED = ("StageError", "sys.exit")
SOURCES = ROOT / "stages/common/sources.py"  # a ValueError there is shown as the line of a parameter
PARAMS = ROOT / "stages/common/params.py"  # its rules return the line of a parameter
FILES = sorted([*(ROOT / "stages").rglob("*.py"), *(ROOT / "commands").rglob("*.py"), *(ROOT / "space").rglob("*.py")])


class Message(NamedTuple):
    """The longest fixed part of an error line, and where it is made."""

    words: str
    where: str


def fixed_words(node: ast.expr) -> str:
    """The longest part of a string or f-string that is always the same; empty for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return max(fixed_words(node.left), fixed_words(node.right), key=len)
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return " ".join(max(texts, key=len, default="").split())


def _lines_of(path: Path) -> Iterator[ast.expr]:
    raised = (*RAISED, "ValueError") if path == SOURCES else RAISED
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in raised and node.args:
            yield node.args[0]
        if path == PARAMS and isinstance(node, ast.FunctionDef) and node.returns is not None:
            if ast.unparse(node.returns) == "str | None":
                for returned in (n.value for n in ast.walk(node) if isinstance(n, ast.Return)):
                    if returned is not None:
                        yield from [returned.body] if isinstance(returned, ast.IfExp) else [returned]


def messages() -> list[Message]:
    """All error lines in stages/, commands/ and space/ that hold fixed words of their own, by file and line."""
    found = []
    for path in FILES:
        for node in sorted(_lines_of(path), key=lambda node: node.lineno):
            if len(words := fixed_words(node)) > 2:
                found.append(Message(words, f"{path.relative_to(ROOT)}:{node.lineno}"))
    return found

"""The error lines of the project, read from its source: what a user may see instead of a result."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.project import ROOT

# An exception of these types ends as a line for the user, wherever it is raised.
RAISED = {"StageError", "ChatError", "RefusedRow", "sys.exit", "FileNotFoundError"}
# Files whose ValueError does, too: a wrong source is the line of a parameter, a damaged model the chat app's.
VALUE_ERRORS = {ROOT / "stages/common/sources.py", ROOT / "space/chatapp/engine/exported_model.py"}
# Its rules return the line of a parameter.
PARAMS = ROOT / "stages/common/params.py"
MIN_WORDS = 8  # characters: a line with fewer fixed ones shows another error's words


class Message(NamedTuple):
    """An error line with … for what varies, and where it is made."""

    words: str
    where: str


def words_of(node: ast.expr) -> str:
    """A string or f-string with … for its variable parts; … for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(words_of(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return words_of(left) + words_of(right)
        case ast.IfExp(body=body):
            return words_of(body)
    return "…"


def _lines_of(path: Path) -> Iterator[ast.expr]:
    raised = RAISED | ({"ValueError"} if path in VALUE_ERRORS else set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in raised and node.args:
            yield node.args[-1]  # that of a refused row stands after its reason
        elif path == PARAMS and isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or node) == "str | None":
            yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None)


def messages() -> list[Message]:
    """All error lines that stages/, commands/ and space/ make, by file and line."""
    found = []
    for path in sorted(path for folder in ("stages", "commands", "space") for path in (ROOT / folder).rglob("*.py")):
        for node in sorted(_lines_of(path), key=lambda node: node.lineno):
            words = " ".join(words_of(node).removeprefix("error: ").split())
            if len(words.replace("…", "").strip()) >= MIN_WORDS:
                found.append(Message(words, f"{path.relative_to(ROOT)}:{node.lineno}"))
    return found


def _docstrings_of(tree: ast.Module) -> set[ast.expr]:
    """The docstrings, and all other texts that stand as statements of their own."""
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def texts_of(path: Path) -> list[str]:
    """The strings and f-strings of a file, each once, with … for variable parts; without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = _docstrings_of(tree)
    found = []
    for node in ast.walk(tree):  # an f-string comes before its parts
        if isinstance(node, ast.JoinedStr):
            inside |= {part for value in node.values for part in ast.walk(value)}
        if node not in inside and isinstance(node, ast.Constant | ast.JoinedStr) and "…" != words_of(node):
            found.append(node)
    return [words_of(node) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def texts() -> list[str]:
    """All texts of stages/, commands/ and space/, and the lines that the Makefile prints."""
    paths = [path for folder in ("stages", "commands", "space") for path in sorted((ROOT / folder).rglob("*.py"))]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return [text for path in paths for text in texts_of(path)] + [line for line in makefile if line[:1] == "\t"]

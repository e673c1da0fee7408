"""The walk-throughs of docs/contributing.md, applied to a copy of the project as a reader would type them."""

import re
from pathlib import Path

from tests.support.project import ROOT

PAGE = "docs/contributing.md"


def walkthrough(heading: str) -> dict[str, list[str]]:
    """The changes of the walk-through under this heading: the lines of each file's part, by the file's name."""
    section = (ROOT / PAGE).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    parts = re.split(r"^--- (\S+)\n", block, flags=re.MULTILINE)[1:]
    return {name: lines.splitlines() for name, lines in zip(parts[::2], parts[1::2], strict=True)}


def places(lines: list[str]) -> list[list[str]]:
    """The lines of a file's part by the place that they change: a line @@ stands between two."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line == "@@":
            found.append([])
        else:
            found[-1].append(line)
    return found


def apply(changes: dict[str, list[str]], folder: Path) -> None:
    """Change the files in `folder`: of each line with its sign, ` ` and `-` are there before, ` ` and `+` after.

    A file that is not there is new: all of its lines have a `+`.
    """
    for name, part in changes.items():
        path = folder / name
        if not path.exists():
            assert all(line.startswith("+") for line in part), f"{PAGE} changes {name}, which is not there"
            path.write_text("".join(f"{line[1:]}\n" for line in part), encoding="utf-8")
            continue
        for lines in places(part):
            text = path.read_text(encoding="utf-8")
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
            assert text.count(before) == 1, f"{PAGE} changes lines that {name} does not have (once):\n{before}"
            path.write_text(text.replace(before, after), encoding="utf-8")

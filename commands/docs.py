"""Write what follows from the parameters' fields in stages/common/schema.py: the comments of params.yaml and of all
recipes (with the default of a key that one of them lacks), each stage's `params:` in dvc.yaml, and docs/parameters.md.
Run: `make docs`; with `--check` it writes nothing, and fails when a file is stale.

Values, a recipe's first lines and the reasons behind "Reference: …;" are the author's, and stay. `dvc exp run -S …`
rewrites params.yaml and drops every comment that follows a list. So a comment stands above its key, but behind the key
where a list may come before it.
"""

import io
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin

from ruamel.yaml import YAML

from stages.common.artifacts import write_text
from stages.common.errors import StageError
from stages.common.params import PARAMS, read_values
from stages.common.pipeline import DVC_YAML
from stages.common.schema import SECTIONS, Params

RECIPES = Path("recipes")
REFERENCE = "phi2-oasst1"
PAGE = Path("docs/parameters.md")
WIDTH = 100
MAX_WIDTH = 120  # of a line with a comment behind its key
MAX_CELL = 40
MAX_NOTE = 60  # of a value in a note
MIN_DESCRIPTION = 12  # characters: less of a description says nothing
NOTE = re.compile(r"Reference: [^;]*; (?P<reason>.*)")
INTRODUCTION = """# Parameters

All of params.yaml, in the order of the stages. A stage reruns only when a key of its own changes. `make docs` makes
this page from the descriptions in `stages/common/schema.py`. `recipes/` holds the complete files.
"""


def yaml() -> YAML:
    """The writer that DVC uses for params.yaml."""
    writer = YAML()
    writer.default_flow_style = False
    return writer


def sections() -> dict[str, list[str]]:
    """The keys that each stage is the first to read, by stage, in the order of the files.

    A list that may be empty follows no other list: its comment would stand behind the key, and DVC, where it writes []
    before a comment, breaks the lines that follow. Such a list comes before the key before the other list.
    """
    seen: set[str] = set()
    result: dict[str, list[str]] = {}
    for stage, section in SECTIONS.items():
        keys: list[str] = []
        for key in (key for key in section.model_fields if key not in seen):
            after_a_list = keys and may_be_a_list(keys[-1]) and may_be_empty(key)
            keys.insert(len(keys) - 2 if after_a_list else len(keys), key)
        result[stage] = keys
        seen |= set(keys)
    return result


def may_be_empty(key: str) -> bool:
    """Whether [] is a value of a key."""
    field = Params.model_fields[key]
    return get_origin(field.annotation) is list and not any(getattr(part, "min_length", 0) for part in field.metadata)


def may_be_a_list(key: str) -> bool:
    def listed(kind: Any) -> bool:
        return get_origin(kind) is list or any(listed(part) for part in get_args(kind))

    return listed(Params.model_fields[key].annotation)


def reasons(text: str) -> dict[str, str]:
    """Why a recipe's values differ from the reference: what stands behind "Reference: …;" in each key's comment."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        code, _, comment = line.partition("# ")
        if not line:  # before a stage
            above = []
        elif not code.strip():
            above.append(comment.strip())
        elif key := re.match(r"(\w+):", code):
            if note := NOTE.search(" ".join([*above, comment.strip()])):
                found[key[1]] = note["reason"].strip()
            above = []
    return found


def shown(value: Any) -> str:
    """A value in a cell or a note: short, and on one line."""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "[]"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) or '""'


def cut(text: str, width: int = MAX_CELL) -> str:
    """A text in at most `width` characters: of a longer one its first words, and …"""
    if len(text) <= width:
        return text
    words = text[:width].rpartition(" ")[0] or text[: width - 1]
    return f"{words.rstrip(' ,;:')}…"


def comment_of(key: str, value: Any, reference: dict[str, Any], reason: str | None) -> list[str]:
    """A key's description, and a note of the reference recipe's value where this one differs."""
    words = [str(Params.model_fields[key].description)]
    if value != reference[key]:
        value = shown(reference[key]).replace(";", ",")  # the reason follows the first semicolon
        if len(value) > MAX_NOTE:
            value = f"see {RECIPES / REFERENCE}.yaml"
        words.append(f"Reference: {value}; {reason or 'why?'}")
    return words


def beside(line: str, words: list[str]) -> str:
    """A line with its key's description and note behind it, in MAX_WIDTH columns; a long description is cut.

    docs/parameters.md has the complete one. The note is kept as it is.
    """
    description, *note = words
    room = MAX_WIDTH - len(line) - len(" # ") - sum(len(part) + 1 for part in note)
    shortened = [cut(description, room)] if room > MIN_DESCRIPTION else []
    return f"{line} # {' '.join([*shortened, *note] or ['…'])}"


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, and the default of each key that they lack. Raises StageError where a field has none."""
    lacking = [key for key in Params.model_fields if key not in values]
    if wrong := [key for key in lacking if Params.model_fields[key].is_required()]:
        raise StageError(f"{', '.join(wrong)}: give the field a default, or each recipe a value, then `make docs`.")
    return {**values, **{key: Params.model_fields[key].get_default() for key in lacking}}


def declared(text: str) -> str:
    """dvc.yaml with each stage's `params:` as its section has them."""
    for stage, section in SECTIONS.items():
        keys = "".join(f"    - {key}\n" for key in section.model_fields)
        block = re.compile(rf"(^  {stage}:\n(?:    .*\n)*?    params:\n)(?:    - .*\n)*", re.MULTILINE)
        text = block.sub(rf"\g<1>{keys}", text)
    return text


def headings() -> list[tuple[str, list[str]]]:
    """The headings of a parameter file, and the keys below each.

    A section that ends with a key that may be a list shares its heading with the next one: DVC would write the list
    below a heading that follows.
    """
    shown: list[tuple[str, list[str]]] = []
    for stage, keys in sections().items():
        if shown and may_be_a_list(shown[-1][1][-1]):
            name, before = shown.pop()
            shown.append((f"{name}, {stage}", before + keys))
        else:
            shown.append((stage, keys))
    return shown


def annotated(text: str, reference: dict[str, Any]) -> str:
    """A parameter file with the same values, and its comments written again."""
    values = with_defaults(YAML(typ="safe").load(text))
    why = reasons(text)
    lines = [line for line in text.splitlines() if line.startswith("#")]
    header = lines[: next((i for i, line in enumerate(lines) if re.match(r"# fetch\b.* -", line)), len(lines))]
    after_a_list = False
    for heading, keys in headings():
        header += ["", f"# {heading} ".ljust(WIDTH - 1, "-")]
        for key in keys:
            out = io.StringIO()
            yaml().dump({key: values[key]}, out)
            written = out.getvalue().rstrip("\n").split("\n")
            words = comment_of(key, values[key], reference, why.get(key))
            if after_a_list:
                # Behind the key, or, of a text that does not fit beside it, behind the text.
                at = 1 if written[0].endswith(": ") else 0
                written[at] = beside(written[at].rstrip(), words)
            else:
                for text in words:
                    header += textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
            header += written
            after_a_list = may_be_a_list(key)
    out = io.StringIO()
    yaml().dump(yaml().load("\n".join(header) + "\n"), out)  # as DVC would write it
    return out.getvalue()


def allowed(key: str) -> str:
    """The values that a key may have, for the table."""

    def of(schema: dict[str, Any]) -> str:
        if "anyOf" in schema:
            options = [of(option) for option in schema["anyOf"]]
            return " or ".join(dict.fromkeys(part for option in options for part in option.split(" or ")))
        if "enum" in schema:
            return ", ".join(str(value) for value in schema["enum"])
        if schema.get("type") == "array":
            return f"list of {of(schema['items'])}"
        bounds = [
            f"{sign} {schema[name]}"
            for name, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
            if name in schema
        ]
        kind = {"boolean": "true, false", "string": "text", "number": "number", "integer": "integer"}
        return " ".join([kind.get(schema["type"], schema["type"]), ", ".join(bounds)]).strip()

    return of(Params.model_json_schema()["properties"][key])


def page(recipes: dict[str, dict[str, Any]]) -> str:
    """docs/parameters.md: a table a stage, with each recipe's values."""
    parts = [INTRODUCTION]
    for stage, keys in sections().items():
        rows = [f"## {stage}", "", f"| parameter | meaning | allowed | {' | '.join(recipes)} |"]
        rows.append("| --- " * (3 + len(recipes)) + "|")
        for key in keys:
            cells = [cut(shown(values[key])).replace("|", "\\|") for values in recipes.values()]
            rows.append(f"| {key} | {Params.model_fields[key].description} | {allowed(key)} | {' | '.join(cells)} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def generated() -> dict[Path, str]:
    """Each generated file and what it should hold."""
    files = [path for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith("previous")]
    reference = with_defaults(read_values(RECIPES / f"{REFERENCE}.yaml"))
    recipes = {path.stem: with_defaults(read_values(path)) for path in files}
    for path in [*files, PARAMS]:
        if unknown := [key for key in read_values(path) if key not in Params.model_fields]:
            raise StageError(f"{path}: {unknown[0]}: is not a parameter; delete its line, or correct it.")
    texts = {path: annotated(path.read_text(encoding="utf-8"), reference) for path in [*files, PARAMS]}
    return {**texts, DVC_YAML: declared(DVC_YAML.read_text(encoding="utf-8")), PAGE: page(recipes)}


def main() -> None:
    stale = [
        (path, text)
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        if stale:
            raise StageError(f"stale: {', '.join(str(path) for path, _ in stale)}. Run `make docs`.")
        return
    for path, text in stale:
        write_text(path, text)
        print(f"docs: {path}")
    print(f"docs: {len(stale)} files changed")

"""A chat template as Jinja text: compiled as transformers does, and freed of its {% generation %} marks."""

import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.common.errors import StageError

MARK = re.compile(r"\{%(?P<before>[-+]?)\s*(?P<end>end)?generation\s*(?P<after>[-+]?)%\}")
DATE = re.compile(r"strftime_now\s*\([^()]*\)")


class _Marks(Extension):
    """Read {% generation %} as what it is to all but training: a block that writes its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML; chat templates expect plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


def compile_template(text: str, name: str, day: datetime | None = None) -> jinja2.Template:
    """Compile a chat template as transformers' `apply_chat_template` does. It can reach only its variables.

    `name` is how messages call it. `day` is what the template takes for now. Raises StageError when it is no template.
    """
    environment = _environment()
    environment.globals["strftime_now"] = lambda form: (day or datetime.now()).strftime(form)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise StageError(f"{name} is no valid Jinja template: line {error.lineno}: {error.message}") from None


def has_marks(text: str) -> bool:
    """Whether a chat template marks the assistant's text."""
    return MARK.search(text) is not None


def plain_template(text: str) -> str:
    """A chat template without its {% generation %} marks, which few programs know. It writes the same text.

    In the place of each mark stands another block tag that writes nothing, with the same signs: Jinja trims white space
    and line breaks around both alike. That is `if true`, which every program knows; but where a variable that is set
    between the marks is read behind them, it is `with`, which keeps variables to itself as the marks do.
    """
    opening, closing = ("with", "endwith") if _sets_what_others_read(text) else ("if true", "endif")
    return MARK.sub(lambda mark: f"{{%{mark['before']} {closing if mark['end'] else opening} {mark['after']}%}}", text)


def _sets_what_others_read(text: str) -> bool:
    if not has_marks(text):
        return False
    try:
        tree = _environment().parse(text)
    except jinja2.TemplateSyntaxError:  # compile_template reports it
        return False
    for block in tree.find_all(nodes.Scope):
        inside = list(block.find_all(nodes.Name))
        known = {id(name) for name in inside}
        read = {n.name for n in tree.find_all(nodes.Name) if n.ctx == "load" and id(n) not in known}
        if read & {name.name for name in inside if name.ctx == "store"}:
            return True
    return False


def dates_of(text: str) -> str:
    """What in a template asks for the date, for a message."""
    return ", ".join(dict.fromkeys(DATE.findall(text))) or "the date"

"""Ollama's Modelfile: a chat template in Go's language that writes what the Jinja template writes.

Only templates of fixed texts around each message can be said so; https://docs.ollama.com/modelfile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.common.chat import Chat, ChatError
from stages.common.chat.probes import probes
from stages.common.chat.skeleton import ANSWER, SYSTEM, USER, Message

QUOTES = '"""'  # around texts; nothing escapes them
QUESTION, INSTRUCTION, REPLY, NEXT = "\x01question\x01", "\x01system\x01", "\x01reply\x01", "\x01next\x01"


@dataclass(frozen=True)
class Turns:
    """The fixed texts of a template: at its start, before and after the content of each role.

    What follows a question opens the answer.
    """

    start: str
    around: dict[str, tuple[str, str]]

    def text(self, messages: Sequence[Message]) -> str:
        parts = [self.start]
        for message in messages:
            before, after = self.around[message["role"]]
            parts += [before, message["content"], after]
        return "".join(parts)

    def go(self) -> str:
        """The template in Go's language."""
        cases: list[str] = []
        for role, (before, after) in self.around.items():
            condition = f'if eq .Role "{role}"' if not cases else f'else if eq .Role "{role}"'
            cases.append(f"{{{{ {condition} }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}")
        return f"{_literal(self.start)}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def turns_of(chat: Chat) -> Turns | None:
    """The fixed texts of a chat template; None where a probe conversation shows that it is not made of such."""
    try:
        first, opening = _between(chat.text([_message(USER, QUESTION)], True), [QUESTION])
        talk = [_message(USER, QUESTION), _message(ANSWER, REPLY), _message(USER, NEXT)]
        _, before_reply, between, _ = _between(chat.text(talk, True), [QUESTION, REPLY, NEXT])
    except (ChatError, ValueError):
        return None
    before_question = _common_end(first, between)
    reply = before_reply.removeprefix(opening), between.removesuffix(before_question)
    around = {USER: (before_question, opening), ANSWER: reply}
    start = first.removesuffix(before_question)
    try:
        before_system, after_system, _ = _between(
            chat.text([_message(SYSTEM, INSTRUCTION), _message(USER, QUESTION)], True), [INSTRUCTION, QUESTION]
        )
    except (ChatError, ValueError):
        pass  # the template refuses a system message
    else:
        if not before_system.startswith(start) or not after_system.endswith(before_question):
            return None
        around[SYSTEM] = (before_system.removeprefix(start), after_system.removesuffix(before_question))
    turns = Turns(start, around)
    return turns if _writes_the_same(turns, chat) else None


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _between(text: str, contents: list[str]) -> list[str]:
    """The texts before, between and after `contents`, which stand in `text` once each, in this order."""
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise ValueError(content)
        parts.append(before)
    return [*parts, text]


def _common_end(a: str, b: str) -> str:
    size = next((i for i in range(min(len(a), len(b))) if a[-1 - i] != b[-1 - i]), min(len(a), len(b)))
    return a[len(a) - size :]


def _writes_the_same(turns: Turns, chat: Chat) -> bool:
    for talk in probes():
        asked = talk[:-1]
        try:
            expected = chat.text(asked, True)
        except ChatError:
            continue
        if any(message["role"] not in turns.around for message in asked) or turns.text(asked) != expected:
            return False
    return True


def modelfile(gguf: str, turns: Turns, ends: Sequence[str], system_prompt: str) -> str:
    """The text of a Modelfile for the file `gguf` beside it. Raises ValueError where a text cannot stand in one."""
    if QUOTES in turns.go() + system_prompt:
        raise ValueError(f"a Modelfile cannot hold {QUOTES}")
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{turns.go()}"""', *(f'PARAMETER stop "{end}"' for end in ends)]
    if system_prompt:
        lines.append(f'SYSTEM """{system_prompt}"""')
    return "\n".join(lines) + "\n"

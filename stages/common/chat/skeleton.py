"""Where each content stands in the text that a chat template writes: exact for any template, marked or not.

A template is rendered on the same roles with a sentinel in the place of each content. That tells the literal text
around contents, the white space that the template strips from each, and the token that closes each answer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from stages.common.errors import StageError

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]  # messages and whether the prompt for an answer follows -> text

SYSTEM, USER, ANSWER = "system", "user", "assistant"
# Roles of short conversations that have an answer at each position where one can stand.
EVERY_POSITION: tuple[Sequence[str], ...] = (
    (USER, ANSWER),
    (USER, ANSWER, USER, ANSWER),
    (SYSTEM, USER, ANSWER),
    (SYSTEM, USER, ANSWER, USER, ANSWER),
    (USER, ANSWER, SYSTEM, USER, ANSWER),
    (USER, ANSWER, ANSWER),
)

SENTINEL = re.compile("\ue000([0-9]+)\ue001")  # private-use characters, which no template writes
PADDED = "\n\u2003{}\u2003\n"  # white space around a sentinel: what is left of it tells what the template strips
SHOWN = 40  # characters of a text in a message

Strip = Callable[[str], str]
LEFT: tuple[Strip, ...] = (str, str.lstrip, lambda text: text.lstrip("\n"))
RIGHT: tuple[Strip, ...] = (str, str.rstrip, lambda text: text.rstrip("\n"))


class ChatError(StageError):
    """A conversation that a template cannot say, or not so that its answers can be found. One line."""

    row: int | None = None  # which conversation of several


@dataclass(frozen=True)
class Answer:
    """What stands around an answer."""

    lead: int  # characters of white space between the prompt for the answer and its content: the model writes them
    gap: int  # characters of white space between its content and its end token
    end: str  # the special token that closes it
    context: str  # what else the template writes between the prompt and the content: not trained
    leftover: str  # what the prompt ends with, but the template does not write before the content


@dataclass(frozen=True)
class Slot:
    """A place where a content stands."""

    before: str  # the literal text between it and the slot before
    message: int  # whose content it is
    left: Strip  # what the template strips
    right: Strip
    answer: Answer | None


@dataclass(frozen=True)
class Span:
    """An answer in a text, in characters: from the end of its prompt up to its end token."""

    start: int
    stop: int  # where its end token begins
    content: str  # as the template strips it
    end: str


@dataclass(frozen=True)
class Skeleton:
    slots: tuple[Slot, ...]
    tail: str

    def fill(self, contents: Sequence[str]) -> tuple[str, list[Span]]:
        """The text with these contents in their places, and the spans of its answers."""
        parts: list[str] = []
        spans: list[Span] = []
        at = 0
        for slot in self.slots:
            content = slot.right(slot.left(contents[slot.message]))
            parts += (slot.before, content)
            at += len(slot.before)
            if answer := slot.answer:
                spans.append(Span(at - answer.lead, at + len(content) + answer.gap, content, answer.end))
            at += len(content)
        parts.append(self.tail)
        return "".join(parts), spans

    def answers(self) -> Iterator[Answer]:
        return (slot.answer for slot in self.slots if slot.answer)


def shown(text: str) -> str:
    """A text in a message: quoted, on one line, cut."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def difference(expected: str, found: str) -> str:
    """Where two texts begin to differ, for a message."""
    at = len(commonprefix([expected, found]))
    start = max(0, at - SHOWN // 2)
    return f"{shown(found[start:])} where {shown(expected[start:])} was expected"


def build_skeleton(
    render: Render, messages: list[Message], fixed: Sequence[bool], controls: re.Pattern[str]
) -> Skeleton:
    """The skeleton of these messages under a template. Contents that are `fixed` stay: they are literal text.

    `controls` matches a special token. Raises ChatError when the template loses a content, or no special token closes
    an answer.
    """
    plain, padded = (_with_sentinels(messages, fixed, form) for form in ("{}", PADDED))
    pieces = SENTINEL.split(render(plain, False))
    order = [int(index) for index in pieces[1::2]]
    literals = pieces[::2]
    _check_order(order, messages, fixed)
    strips = _strips(order, literals, SENTINEL.split(render(padded, False)))
    slots = []
    for k, message in enumerate(order):
        answer = None
        if messages[message]["role"] == ANSWER:
            last = order[k - 1] if k else None
            prompt = _prompt_before(render, plain[:message], last)
            answer = _answer(literals[k], literals[k + 1], prompt, controls)
        slots.append(Slot(literals[k], message, *strips[k], answer))
    return Skeleton(tuple(slots), literals[-1])


def _with_sentinels(messages: list[Message], fixed: Sequence[bool], form: str) -> list[Message]:
    return [
        message if stays else {**message, "content": form.format(f"\ue000{i}\ue001")}
        for i, (message, stays) in enumerate(zip(messages, fixed, strict=True))
    ]


def _check_order(order: list[int], messages: list[Message], fixed: Sequence[bool]) -> None:
    for i, message in enumerate(messages):
        if not fixed[i] and i not in order:
            remedy = ' Set system_prompt: "", or choose another.' if message["role"] == SYSTEM else " Choose another."
            raise ChatError(f"it does not write the content of {message['role']} messages (as plain text).{remedy}")
    late = [i for i, m in enumerate(messages) if m["role"] == SYSTEM and i and not fixed[i] and not fixed[i - 1]]
    if any(order.index(i) < order.index(i - 1) for i in late):
        raise ChatError("it moves a system message in front of what was said before it. Choose another.")
    answers = [i for i in order if messages[i]["role"] == ANSWER]
    if answers != sorted(set(answers)):
        raise ChatError("it writes answers more than once, or in another order. Choose another.")


def _strips(order: list[int], literals: list[str], padded: list[str]) -> list[tuple[Strip, Strip]]:
    """What is stripped left and right of each slot, by the white space that is left of the padding."""
    chosen: list[list[Strip]] = [[str, str] for _ in order]
    if [int(index) for index in padded[1::2]] != order:  # white space changes more: the texts will not be equal
        return [(left, right) for left, right in chosen]
    before, after = PADDED.split("{}")
    for k, text in enumerate(padded[::2]):
        rights = RIGHT if k else RIGHT[:1]
        lefts = LEFT if k < len(order) else LEFT[:1]
        for right, left in ((right, left) for right in rights for left in lefts):
            kept = (right(after) if k else "") + literals[k] + (left(before) if k < len(order) else "")
            if kept == text:
                if k:
                    chosen[k - 1][1] = right
                if k < len(order):
                    chosen[k][0] = left
                break
    return [(left, right) for left, right in chosen]


def _prompt_before(render: Render, messages: list[Message], last: int | None) -> str | None:
    """What the prompt for an answer writes behind the content `last`; None when the template asks for none there."""
    try:
        pieces = SENTINEL.split(render(messages, True))
    except ChatError:  # an answer that no question is before
        return None
    return pieces[-1] if (int(pieces[-2]) if len(pieces) > 1 else None) == last else None


def _answer(before: str, after: str, prompt: str | None, controls: re.Pattern[str]) -> Answer:
    end = controls.match(after.lstrip())
    if end is None:
        raise ChatError(
            f"in it an answer is followed by {shown(after)}, which is no special token of the base model, so the model "
            "could not learn to stop. Choose a template that fits the model."
        )
    between = leftover = ""
    if prompt is not None:
        same = len(commonprefix([before, prompt]))
        between, leftover = before[same:], prompt[same:]
    is_space = not between.strip() and not leftover
    return Answer(
        lead=len(between) if is_space else 0,
        gap=len(after) - len(after.lstrip()),
        end=end[0],
        context="" if is_space else between,
        leftover=leftover,
    )


def find_by_prompts(render: Render, messages: list[Message], controls: re.Pattern[str]) -> tuple[str, list[Span]]:
    """The text of a conversation and the spans of its answers, each looked for right behind its prompt.

    For templates that change literal text by what a content says (a `<think>` block, say). Raises ChatError where a
    content is not written as it is.
    """
    text = render(messages, False)
    spans: list[Span] = []
    for number, message in ((i, m) for i, m in enumerate(messages) if m["role"] == ANSWER):
        prompt, content = render(messages[:number], True), message["content"].strip()
        rest = text[len(prompt) :].lstrip() if text.startswith(prompt) else ""
        if not rest.startswith(content):
            found = difference(prompt + content, text)
            raise ChatError(f"it rewrites answer {len(spans) + 1}: {found}. Choose another.")
        start = len(text) - len(rest)
        after = rest[len(content) :]
        stop = len(text) - len(after.lstrip())
        end = controls.match(text, stop)
        if end is None:
            raise ChatError(
                f"it writes {shown(after)} after answer {len(spans) + 1}, and no special token. Choose another."
            )
        spans.append(Span(len(prompt), stop, text[start : start + len(content)], end[0]))
    return text, spans

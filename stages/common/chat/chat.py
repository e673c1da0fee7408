"""Chat: a tokenizer and its chat template. Conversations to text, token ids and the tokens of each answer."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from stages.common.chat.skeleton import (
    ANSWER,
    EVERY_POSITION,
    SYSTEM,
    ChatError,
    Message,
    Skeleton,
    Span,
    build_skeleton,
    find_by_prompts,
    shown,
)
from stages.common.chat.template import compile_template, dates_of, plain_template
from stages.common.chat.tokens import Tokens
from stages.common.errors import StageError, first_line
from stages.common.params import TEMPLATES

T = TypeVar("T")

BATCH = 512  # conversations tokenised at once: enough for the fast tokenizer's threads, little memory
TWO_DAYS = (datetime(2001, 2, 3, 4, 5), datetime(2022, 11, 10, 9, 8))


class Encoded(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]  # each answer, from its first token to behind its end token
    escaped: bool  # whether a text in it spelt a control token


class Written(NamedTuple):
    """A conversation in text."""

    text: str
    spans: list[Span]
    escaped: bool


class Chat:
    """A tokenizer with its chat template, by which all stages read conversations.

    A text that spells a control token is escaped, as in the chat app: an invisible space stands inside it.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, special_tokens: dict[str, str], name: str) -> None:
        """`special_tokens`: what the template knows as bos_token and the like. `name`: the template's, in messages."""
        self.name = name
        self._tokens = Tokens(tokenizer)
        self._special_tokens = special_tokens
        self._template = compile_template(plain_template(template), name)
        if "strftime_now" in template:  # the only clock that a template can reach
            self._check_date(template)
        self._skeletons: dict[tuple[object, ...], Skeleton] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str = "the chat template") -> "Chat":
        """A tokenizer of transformers, which must have a chat template."""
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        return cls(tokenizer.backend_tokenizer, str(tokenizer.chat_template), special, name)

    @classmethod
    def of_folder(cls, folder: Path) -> "Chat":
        """A folder's tokenizer.json, tokenizer_config.json and chat_template.jinja, read as the chat app reads them."""
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and value is not None
        }
        template = folder / "chat_template.jinja"
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(tokenizer, template.read_text(encoding="utf-8"), special, str(template))

    def _check_date(self, template: str) -> None:
        """Raise StageError when the template writes the date: no two days would give the same tokens."""
        clocks = [compile_template(plain_template(template), self.name, day) for day in TWO_DAYS]
        for roles in EVERY_POSITION:
            messages = [{"role": role, "content": "?"} for role in roles]
            texts = set()
            for clock in clocks:
                with suppress(Exception):  # it takes no such roles
                    texts.add(clock.render(messages=messages, tools=None, documents=None, **self._special_tokens))
            if len(texts) > 1:
                raise StageError(
                    f"{self.name}: it writes the date ({dates_of(template)}), so that every day would give other "
                    f"tokens. Copy it to {TEMPLATES}/NAME.jinja, put a fixed date there, and set chat_template: NAME."
                )

    def escaped(self, messages: Sequence[Message]) -> list[Message]:
        """The roles and the escaped contents of messages."""
        return [{"role": message["role"], "content": self._tokens.escape(message["content"])} for message in messages]

    def text(self, messages: Sequence[Message], prompt: bool) -> str:
        """The text of a conversation; with `prompt`, up to where an answer begins. Raises ChatError, in one line."""
        try:
            return self._render(self.escaped(messages), prompt)
        except ChatError as error:
            raise self._named(error) from None

    def ids(self, messages: Sequence[Message], prompt: bool = True) -> list[int]:
        """The token ids of a conversation; with `prompt`, up to where an answer begins."""
        return self._tokens.ids(self.text(messages, prompt))

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """As `stream`, all at once."""
        return list(self.stream(conversations))

    def stream(self, conversations: Sequence[Sequence[Message]]) -> Iterator[Encoded]:
        """Each conversation in tokens, in order, with as many spans as it has answers.

        A span decodes to the answer's text and one end token. Raises ChatError where that cannot be; its `row` is the
        number of the conversation.
        """
        with ThreadPoolExecutor(1) as pool:  # the tokenizer works meanwhile, without Python's lock
            waiting = None
            for start in range(0, len(conversations), BATCH):
                written = [
                    self._in_row(start + i, self._write, messages)
                    for i, messages in enumerate(conversations[start : start + BATCH])
                ]
                encodings = pool.submit(self._tokens.encode, [each.text for each in written])
                if waiting:
                    yield from self._finish(*waiting)
                waiting = start, written, encodings
            if waiting:
                yield from self._finish(*waiting)

    def why_not(self, messages: Sequence[Message]) -> str | None:
        """Why the template cannot write a conversation, in one line; None where it can."""
        try:
            self._write(messages)
        except ChatError as error:
            return str(self._named(error))
        return None

    def _write(self, messages: Sequence[Message]) -> Written:
        escaped = self.escaped(messages)
        changed = any(new["content"] != old["content"] for new, old in zip(escaped, messages, strict=True))
        return Written(*self._find(escaped), changed)

    def _finish(self, start: int, written: list[Written], encodings: "Future[list[Encoding]]") -> Iterator[Encoded]:
        for row, (each, encoding) in enumerate(zip(written, encodings.result(), strict=True), start):
            ids: list[int] = encoding.ids
            answers = self._in_row(row, self._tokens.find, encoding, ids, each.text, each.spans)
            self._in_row(row, self._tokens.check, ids, answers, each.spans)
            yield Encoded(ids, [(answer.start, answer.stop) for answer in answers], each.escaped)

    def end_tokens(self) -> list[str]:
        """The tokens that close an answer, wherever it stands; first the one at the end of a conversation.

        Raises ChatError when the template takes no conversation at all.
        """
        ends = [answer.end for skeleton in self._at_every_position() for answer in skeleton.answers()]
        last = next(self._at_every_position()).slots[-1].answer
        return list(dict.fromkeys([last.end if last else ends[0], *ends]))

    def notes(self) -> list[str]:
        """What a user may know of the template: what it writes between a prompt and the answer, one line each."""
        answers = next(self._at_every_position()).answers()
        return [
            f"{self.name} writes {shown(answer.context)} before an answer: context, not trained on."
            for answer in answers
            if answer.context
        ]

    def warnings(self) -> list[str]:
        """Where a prompt differs from the beginning of what is trained on, one line each."""
        return [
            f"{self.name}: a prompt ends with {shown(answer.leftover)}, which it does not write before the answers of "
            "a conversation: the model is asked otherwise than it was trained."
            for answer in next(self._at_every_position()).answers()
            if answer.leftover
        ]

    def _at_every_position(self) -> Iterator[Skeleton]:
        """The skeletons of short conversations with an answer at every position that the template takes."""
        refused = None
        taken = 0
        for roles in EVERY_POSITION:
            messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
            try:
                skeleton = self._skeleton(messages)
            except ChatError as error:
                refused = refused or error
            else:
                taken += 1
                yield skeleton
        if refused and not taken:
            raise self._named(refused)

    def _skeleton(self, messages: list[Message]) -> Skeleton:
        key = tuple(m["role"] if m["content"].strip() else (m["role"], m["content"]) for m in messages)
        if key not in self._skeletons:
            fixed = [not message["content"].strip() for message in messages]
            self._skeletons[key] = build_skeleton(self._render, messages, fixed, self._tokens.control)
        return self._skeletons[key]

    def _find(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text of escaped messages and the spans of their answers, or a ChatError."""
        text = self._render(messages, False)
        contents = [message["content"] for message in messages]
        answers = [content for content, message in zip(contents, messages, strict=True) if message["role"] == ANSWER]
        if all(answer.strip() for answer in answers):
            expected, spans = self._skeleton(messages).fill(contents)
            if expected == text and len(spans) == len(answers):
                return text, spans
        # Literal text depends on what a content says: on what a user says, or on an answer itself (a <think> block).
        for message in messages:
            if message["role"] != ANSWER and message["content"].strip() not in text:
                raise ChatError(
                    f"it rewrites or drops the {message['role']}'s text {shown(message['content'])}. Choose another."
                )
        with suppress(ChatError):
            fixed = [message["role"] != ANSWER for message in messages]
            expected, spans = build_skeleton(self._render, messages, fixed, self._tokens.control).fill(contents)
            if expected == text and len(spans) == len(answers) and all(span.content for span in spans):
                return text, spans
        return find_by_prompts(self._render, messages, self._tokens.control)

    def _render(self, messages: list[Message], prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **self._special_tokens
            )
        except (jinja2.UndefinedError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise ChatError(
                f"it takes no plain text as content ({first_line(error)}), but parts, as for images. Choose another."
            ) from None
        except jinja2.TemplateError as error:
            raise self._refusal(messages, prompt, first_line(error)) from None

    def _refusal(self, messages: list[Message], prompt: bool, reason: str) -> ChatError:
        others = [message for message in messages if message["role"] != SYSTEM]
        if len(others) < len(messages):
            try:
                self._render(others, prompt)
            except ChatError:
                pass
            else:
                return ChatError(
                    f'it takes no such system message ({reason}). Set system_prompt: "" and leave system messages out '
                    "of the data, or choose another."
                )
        roles = ", ".join(message["role"] for message in messages[:8]) + (", …" if len(messages) > 8 else "")
        return ChatError(f"it refuses messages of {roles or 'no role'} ({reason}). Change the data, or choose another.")

    def _named(self, error: ChatError, row: int | None = None) -> ChatError:
        named = ChatError(f"{self.name}: {error}")
        named.row = row
        return named

    def _in_row(self, row: int, do: Callable[..., T], *args: Any) -> T:
        try:
            return do(*args)
        except ChatError as error:
            raise self._named(error, row) from None


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all tokens that end an answer: the tokenizer's end token, and those of its chat template."""
    tokens = Chat.of(tokenizer).end_tokens() if tokenizer.chat_template else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(tokens)]))

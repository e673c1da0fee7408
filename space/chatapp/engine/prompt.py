"""Turn a conversation into the tokens that the model reads: as in training, and within the model's context.

The exported model's folder holds all that this needs: tokenizer.json, tokenizer_config.json, chat_template.jinja.
"""

import json
from bisect import bisect_left
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from chatapp.engine.conversation import (
    MAX_TOKEN_CHARACTERS,
    Message,
    as_in_training,
    check_messages,
    hopeless_turns,
    split_turns,
)

# Turns are dropped in strides. The beginning of the prompt then stays the same over several answers, and the cache
# (rows.py) can reuse it.
STRIDES_IN_CONTEXT = 4


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML; chat templates expect plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compile_template(text: str) -> jinja2.Template:
    """Compile a chat template as transformers' `apply_chat_template` does. It can reach only its variables."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


class PromptBuilder:
    """The tokenizer and the chat template of an exported model."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._template = compile_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self._special_tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and value is not None
        }
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._control_tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)

    def ids(self, messages: list[Message]) -> list[int]:
        """The ids of a complete conversation up to where the answer begins."""
        plain = [{"role": m["role"], "content": self._without_control_tokens(m["content"])} for m in messages]
        return list(self.tokenizer.encode(self._render(plain), add_special_tokens=False).ids)

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain text, as the tokenizer reads it: control tokens are control tokens here."""
        return list(self.tokenizer.encode(text).ids)

    def _render(self, messages: list[Message]) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except jinja2.exceptions.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None

    def _check_late_system(self, messages: list[Message]) -> None:
        """Raise ValueError when the template drops or moves a system message after other messages.

        Training leaves out such conversations (`late_system`).
        """
        late = [i for i in range(1, len(messages)) if messages[i]["role"] == "system"]
        if not late:
            return
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private characters: no template writes them
        text = self._render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
        if any(not -1 < text.find(marks[i - 1]) < text.find(marks[i]) for i in late):
            raise ValueError(
                "the model's chat template cannot say a system message after other messages: send it first"
            )

    def _without_control_tokens(self, text: str) -> str:
        """`text` with an invisible space inside each control token; otherwise it could end or begin a turn."""
        for token in self._control_tokens:
            if token in text:
                text = text.replace(token, f"{token[:1]}\u200b{token[1:]}")
        return text

    def fit(self, messages: list[Message], context_length: int, room: int) -> tuple[list[int], int]:
        """The ids of a conversation cut so that `room` tokens are left for the answer, and the number of turns dropped.

        The oldest turns are dropped first. The system message and the last turn stay; ValueError is raised when these
        two are too long.
        """
        check_messages(messages)
        system, turns = split_turns(as_in_training(messages))
        unread = hopeless_turns(turns, MAX_TOKEN_CHARACTERS * context_length)
        turns = turns[unread:]

        def kept(dropped: int) -> list[Message]:
            # Joined again: the first turn that is kept may begin with a system message.
            return as_in_training(system + [message for turn in turns[dropped:] for message in turn])

        def after(dropped: int) -> list[int]:
            return self.ids(kept(dropped))

        self._check_late_system(kept(0))

        limit = context_length - room
        ids = after(0)
        if len(ids) <= limit:
            return ids, unread
        shortest = after(len(turns) - 1)
        if len(shortest) > limit:
            raise ValueError(
                f"the last message is too long: with the system message it has {len(shortest)} tokens. The model reads "
                f"{context_length} tokens, and {room} of these are reserved for the answer"
            )
        stride = max(1, context_length // STRIDES_IN_CONTEXT)
        too_many = -(-(len(ids) - limit) // stride) * stride
        aim = max(len(ids) - too_many, len(shortest))
        dropped = bisect_left(range(len(turns) - 1), -aim, key=lambda n: -len(after(n)))
        return after(dropped), unread + dropped

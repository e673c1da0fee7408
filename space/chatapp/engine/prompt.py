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

Message = dict[str, str]

# Turns are dropped in strides. The beginning of the prompt then stays the same over several answers, and the cache
# (prompt_cache.py) can reuse it.
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


def check_messages(messages: Any) -> None:
    """Raise ValueError, with one line, unless `messages` is a conversation whose last message is the user's."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages[{i}] must have a role and a content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"messages[{i}].role must be system, user or assistant")
        if not isinstance(message["content"], str):
            raise ValueError(f"messages[{i}].content must be text")
        if message["role"] == "system" and i:
            raise ValueError(f"messages[{i}]: a system message must be the first")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the last message must be the user's, and not empty")


def split_turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system message (a list of one or none) and the turns.

    A turn begins at the user's first message after an answer.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns: list[list[Message]] = []
    for message in messages[len(system) :]:
        if not turns or (message["role"] == "user" and turns[-1][-1]["role"] == "assistant"):
            turns.append([])
        turns[-1].append(message)
    return system, turns


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
        try:
            text = self._template.render(
                messages=plain, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except jinja2.exceptions.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

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
        system, turns = split_turns(messages)

        def after(dropped: int) -> list[int]:
            return self.ids(system + [message for turn in turns[dropped:] for message in turn])

        limit = context_length - room
        ids = after(0)
        if len(ids) <= limit:
            return ids, 0
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
        return after(dropped), dropped

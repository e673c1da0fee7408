"""Conversations on which two readers of one chat template are compared, token by token."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from stages.common.chat.chat import Chat
from stages.common.chat.skeleton import ANSWER, SYSTEM, USER, ChatError, Message
from stages.common.errors import StageError

Reader = Callable[[list[Message], bool], list[int]]  # messages and whether the prompt for an answer follows -> ids


CODE = "Here it is:\n\n```python\ndef add(a, b):\n    return a + b  # {{ a }} {% b %}\n```\n"
_TURNS = [
    (USER, "What is the capital of France?"),
    (ANSWER, "Paris."),
    (USER, "Write a function that adds two numbers."),
    (ANSWER, CODE),
    (USER, "  ¿Por qué el cielo es azul? 空はなぜ青いのですか。 \n"),
    (ANSWER, "\n\n  Because of <b>scattering</b> & more 🙂\n \n"),
]
_SYSTEM = (SYSTEM, " You are a helpful assistant.\n")


def probes() -> list[list[Message]]:
    """Conversations of one and several turns, with and without a system message, with code and odd white space."""
    turns = [_TURNS[:2], _TURNS[2:4], _TURNS[4:], _TURNS]
    talks = [*turns, *([_SYSTEM, *talk] for talk in turns)]
    return [[{"role": role, "content": content} for role, content in talk] for talk in talks]


def rendered_by(tokenizer: PreTrainedTokenizerBase) -> Reader:
    """What transformers' own `apply_chat_template` makes of messages."""
    return lambda messages, prompt: list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    )


def check_same_ids(chat: Chat, reader: Reader, where: str) -> None:
    """Raise StageError unless `reader` gives the ids of `chat`, on complete conversations and on prompts.

    Conversations that the template refuses are left out; `where` names the other reader.
    """
    compared = 0
    for talk in probes():
        for messages, prompt in ((talk, False), (talk[:-1], True)):
            try:
                expected = chat.ids(messages, prompt)
            except ChatError:
                continue
            compared += 1
            found = reader(chat.escaped(messages), prompt)
            if found != expected:
                at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
                at = min(len(expected), len(found)) if at is None else at
                raise StageError(
                    f"{where} gives other tokens than training saw: {found[at : at + 5]} where "
                    f"{expected[at : at + 5]} were expected, at token {at} of a probe conversation. Take another "
                    "chat_template."
                )
    if not compared:
        raise StageError(f"{chat.name} takes none of the probe conversations. Take another chat_template.")

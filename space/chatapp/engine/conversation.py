"""A conversation's messages: checked, brought into the form of training, and split into turns."""

from itertools import groupby
from typing import Any

Message = dict[str, str]

BLANK_LINE = "\n\n"
# Characters per token of a conversation, on average; text in any language has far fewer.
MAX_TOKEN_CHARACTERS = 32


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
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the last message must be the user's, and not empty")


def as_in_training(messages: list[Message]) -> list[Message]:
    """The messages as the prepare stage writes a conversation.

    Messages of the same role in a row are joined by a blank line; each system text is said once. System messages
    without text are left out. Raises ValueError where a system message stands between two turns of the same role:
    training leaves out such conversations.
    """
    said = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    joined = [_joined(role, [message["content"] for message in run]) for role, run in groupby(said, _role)]
    for before, between, after in zip(joined, joined[1:], joined[2:], strict=False):
        if between["role"] == "system" and before["role"] == after["role"]:
            raise ValueError(
                f"a system message stands between two messages of the {before['role']}: move it before or after both"
            )
    return joined


def split_turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system message (a list of one or none) and the turns.

    A turn begins at the first message after an answer: the user's, or a system message before it.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns: list[list[Message]] = []
    for message in messages[len(system) :]:
        if not turns or (message["role"] != "assistant" and turns[-1][-1]["role"] == "assistant"):
            turns.append([])
        turns[-1].append(message)
    return system, turns


def characters_that_stay(messages: list[Message]) -> int:
    """The characters of what is never dropped: the system message and the last turn."""
    system, turns = split_turns(as_in_training(messages))
    return characters(system) + characters(turns[-1] if turns else [])


def characters(messages: list[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def hopeless_turns(turns: list[list[Message]], limit: int) -> int:
    """How many of the oldest turns to drop unread because the turns have more than `limit` characters.

    The last turn stays. They are dropped in strides of half the limit, for the same reason as in `PromptBuilder.fit`.
    """
    lengths = [characters(turn) for turn in turns]
    stride = max(1, limit // 2)
    too_many = -(-max(0, sum(lengths) - limit) // stride) * stride
    dropped = 0
    while too_many > 0 and dropped < len(turns) - 1:
        too_many -= lengths[dropped]
        dropped += 1
    return dropped


def _role(message: Message) -> str:
    return message["role"]


def _joined(role: str, texts: list[str]) -> Message:
    if len(texts) > 1:
        texts = list(dict.fromkeys(texts)) if role == "system" else texts
        texts = [text for text in texts if text.strip()] or texts[:1]
    return {"role": role, "content": BLANK_LINE.join(texts)}

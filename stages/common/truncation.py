"""What is left of a conversation within max_length tokens: complete turns only, the first or the last of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.common.chat import Chat, Encoded
from stages.common.chat.skeleton import ANSWER, SYSTEM, Message

BLANK_LINE = "\n\n"
SLACK = 16  # tokens that a template may write between turns, and not at the beginning of a conversation


class Cut(NamedTuple):
    """What is left of a conversation in tokens."""

    ids: list[int]
    mask: np.ndarray  # 1 on the tokens of the answers that are to be trained on
    lost: int  # how many answers it lost
    trained: int  # how many of those that are left are trained on


def cut_to_turns(encoded: Encoded, trained: Sequence[bool], max_length: int) -> Cut | None:
    """A conversation up to the last complete answer within `max_length` tokens; None when no answer to train on fits.

    `trained` says of each answer whether it is to be trained on.
    """
    kept = [span for span in encoded.spans if span[1] <= max_length]
    if not any(trained[: len(kept)]):
        return None
    end = kept[-1][1]
    mask = np.zeros(end, dtype=np.int64)
    for (start, stop), wanted in zip(kept, trained, strict=False):
        if wanted:
            mask[start:stop] = 1
    return Cut(encoded.ids[:end], mask, len(encoded.spans) - len(kept), int(sum(trained[: len(kept)])))


def last_turns(messages: Sequence[Message], lost: int) -> list[Message]:
    """A conversation without its first `lost` answers and what stands before them: it starts with a question.

    System messages stay, in front: they hold for what follows them.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == ANSWER]
    begin = answers[lost - 1] + 1 if lost else 0
    while messages[begin]["role"] == SYSTEM:
        begin += 1
    systems = list(dict.fromkeys(m["content"] for m in messages[:begin] if m["role"] == SYSTEM))
    return [*([{"role": SYSTEM, "content": BLANK_LINE.join(systems)}] if systems else []), *messages[begin:]]


def cut_to_last_turns(
    chat: Chat, messages: Sequence[Message], encoded: Encoded, trained: Sequence[bool], max_length: int
) -> Cut | None:
    """A conversation without as many of its first turns as needed, so that it has at most `max_length` tokens.

    The template writes what is left as a conversation that starts there. None when its last answer does not fit, or
    no answer to train on is left.
    """
    last = encoded.spans[-1][1]
    for lost in range(len(encoded.spans)):
        before = encoded.spans[lost - 1][1] if lost else 0
        if last - before > max_length + SLACK:  # without its system message it would be too long
            continue
        (shorter,) = chat.encode([last_turns(messages, lost)]) if lost else (encoded,)
        if shorter.spans[-1][1] <= max_length:
            cut = cut_to_turns(shorter, trained[lost:], max_length)
            return cut._replace(lost=lost) if cut else None
    return None


def cut_conversation(
    chat: Chat, row: tuple[Sequence[Message], Sequence[bool]], encoded: Encoded, max_length: int, side: str
) -> Cut | None:
    """What is left of a conversation, `row` (its messages, and of each answer whether it is to be trained on).

    `side` is the side that is cut off: right (its last turns) or left (its first turns).
    """
    messages, trained = row
    if side == "left" and encoded.spans and encoded.spans[-1][1] > max_length:
        return cut_to_last_turns(chat, list(messages), encoded, trained, max_length)
    return cut_to_turns(encoded, trained, max_length)


def lost_turns(messages: Sequence[Message], cut: Cut | None, side: str) -> list[Message]:
    """The questions and answers that a conversation lost; all of them where nothing is left of it."""
    turns = [message for message in messages if message["role"] != SYSTEM]
    if cut is None:
        return turns
    ends = [i + 1 for i, message in enumerate(turns) if message["role"] == ANSWER]
    if side == "left":
        return turns[: ends[cut.lost - 1]] if cut.lost else []
    return turns[ends[-cut.lost - 1] :]

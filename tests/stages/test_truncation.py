"""The last turns of a conversation that is too long: a conversation of its own, which the template writes again."""

import pytest

from stages.common.chat import Chat
from stages.common.truncation import cut_conversation, last_turns, lost_turns
from tests.support.templates import LOOP, PROMPT, SMALL, TURN, tokenizer_for

SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " + "word " * 5} for i in range(8)]


def chat_of(template: str) -> tuple[Chat, object]:
    tokenizer = tokenizer_for(template)
    return Chat.of(tokenizer), tokenizer


def cut(chat: Chat, messages: list[dict], max_length: int, trained: list[bool] | None = None):
    (encoded,) = chat.encode([messages])
    flags = trained or [True] * sum(m["role"] == "assistant" for m in messages)
    return cut_conversation(chat, (messages, flags), encoded, max_length, "left")


@pytest.mark.parametrize("name", ["chatml", "begins_with_bos", "system_in_first_question", "strips"])
def test_the_last_turns_are_written_as_a_conversation_of_their_own(name):
    template = LOOP + TURN + PROMPT if name == "chatml" else SMALL[name]
    chat, tokenizer = chat_of(template)
    messages = [SYSTEM, *TALK]
    (whole,) = chat.encode([messages])
    full = whole.spans[-1][1]
    for lost in range(4):
        shorter = [SYSTEM, *TALK[2 * lost :]]
        (expected,) = chat.encode([shorter])
        need = expected.spans[-1][1]
        left = cut(chat, messages, need)
        assert left.ids == expected.ids[:need] and left.lost == lost and left.trained == 4 - lost
        assert sum(left.mask) == sum(stop - start for start, stop in expected.spans)
        assert lost_turns(messages, left, "left") == TALK[: 2 * lost]
        said = tokenizer.decode(left.ids)
        assert "Be kind." in said and f"turn {2 * lost} " in said and f"turn {2 * lost - 1} " not in said
    assert cut(chat, messages, full).lost == 0
    assert cut(chat, messages, need - 1) is None  # the last question and answer alone are longer


def test_what_is_left_must_have_an_answer_to_train_on():
    chat, _ = chat_of(LOOP + TURN + PROMPT)
    (last,) = chat.encode([TALK[6:]])
    assert cut(chat, TALK, last.spans[-1][1], [True, True, True, False]) is None
    left = cut(chat, TALK, last.spans[-1][1], [False, False, False, True])
    assert left.trained == 1 and left.lost == 3


def test_system_messages_of_the_turns_that_are_lost_stay():
    late = {"role": "system", "content": "From now on in French."}
    messages = [SYSTEM, *TALK[:2], late, *TALK[2:4], *TALK[4:]]
    assert last_turns(messages, 0) == messages
    both = {"role": "system", "content": "Be kind.\n\nFrom now on in French."}
    assert last_turns(messages, 1) == [both, *TALK[2:]]
    assert last_turns(messages, 2) == [both, *TALK[4:]]
    assert last_turns([SYSTEM, *TALK[:2], SYSTEM, *TALK[2:]], 2) == [SYSTEM, *TALK[4:]]
    assert last_turns(TALK, 3) == TALK[6:]

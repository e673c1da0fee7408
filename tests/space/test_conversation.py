"""Conversations become what training writes: system messages, turns in a row, and the oldest turns of long ones."""

import shutil

import pytest

from chatapp.engine.conversation import as_in_training, characters_that_stay, hopeless_turns, split_turns
from chatapp.engine.prompt import PromptBuilder
from stages.common.chat import plain_template
from stages.conversations.turns import Turn, alternating, fold_system, unfolded
from tests.support.chats import chat
from tests.support.project import ROOT

LATE = "{{ raise_exception('the first message only') if message.role == 'system' and not loop.first }}"
MOVES = (
    "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"
)
TEMPLATES = {
    "refuses it": "{% for message in messages %}" + LATE + "{{ message.content }}\n{% endfor %}",
    "moves it": MOVES,
    "drops it": "{% for m in messages %}{{ m.content if loop.first or m.role != 'system' }}\n{% endfor %}",
}


def turns(*pairs: str) -> list[dict]:
    """Messages of `role: content` texts; s, u and a stand for the roles."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[pair[0]], "content": pair[3:]} for pair in pairs]


def of_training(messages: list[dict]) -> list[dict]:
    """The messages as the prepare stage writes them; its default system message is none here."""
    folded, _ = fold_system([Turn(message["role"], message["content"]) for message in messages], None)
    written = unfolded(list(alternating(folded)))
    return [{"role": turn.role, "content": turn.text} for turn in written if turn.role != "system" or turn.text]


@pytest.mark.parametrize(
    "messages",
    [
        turns("u: a", "a: b", "u: c"),
        turns("s: x", "s: y", "u: a"),
        turns("s: x", "s: x", "s:  ", "s: y", "u: a"),
        turns("s: ", "u: a"),
        turns("u: a", "a: b", "s: x", "u: c"),
        turns("s: w", "u: a", "a: b", "s: x", "s: y", "u: c"),
        turns("u: a", "u: b", "a: c", "a: d", "u: e", "u:  ", "u: f"),
        turns("u: a", "s: x", "a: b", "u: c"),
    ],
)
def test_messages_are_joined_as_in_training(messages):
    assert as_in_training(messages) == of_training(messages)
    assert as_in_training(as_in_training(messages)) == as_in_training(messages)


def test_a_system_message_between_two_turns_of_one_role_is_refused():
    with pytest.raises(ValueError, match="a system message stands between two messages of the user: move it"):
        as_in_training(turns("u: a", "s: x", "u: b"))


def test_a_late_system_message_begins_a_turn():
    system, after = split_turns(turns("s: x", "u: a", "a: b", "s: y", "u: c", "a: d", "u: e"))
    assert system == turns("s: x")
    assert after == [turns("u: a", "a: b"), turns("s: y", "u: c", "a: d"), turns("u: e")]


@pytest.fixture
def builder(tiny_llama, tmp_path):
    """A function: the prompts of the tiny model with this template (None: ChatML)."""

    def build(template: str | None) -> PromptBuilder:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        chatml = (ROOT / "stages/templates/chatml.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template or plain_template(chatml))
        return PromptBuilder(folder)

    return build


def test_a_late_system_message_stays_in_its_place(builder):
    prompt = builder(None)
    messages = turns("u: one", "a: two", "s: three", "u: four")
    ids, dropped = prompt.fit(messages, 500, 10)
    assert (ids, dropped) == (prompt.ids(messages), 0)
    joined = turns("s: Be brief.\n\nBe kind.", "u: Hi")
    assert prompt.fit(turns("s: Be brief.", "s: Be kind.", "u: Hi"), 500, 10)[0] == prompt.ids(joined)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_late_system_message_is_refused_where_the_template_cannot_say_it(template, builder):
    prompt = builder(TEMPLATES[template])
    assert prompt.fit(turns("s: zero", "u: one", "a: two", "u: four"), 500, 10)[1] == 0
    with pytest.raises(ValueError, match="the model's chat template (cannot say|refuses)"):
        prompt.fit(turns("s: zero", "u: one", "a: two", "s: three", "u: four"), 500, 10)


def test_a_history_of_any_length_loses_its_oldest_turns(builder, monkeypatch):
    prompt, read = builder(None), []
    monkeypatch.setattr(prompt, "ids", lambda messages, ids=prompt.ids: read.append(messages) or ids(messages))
    texts = [f"{'word ' * 12}{i}" for i in range(20001)]
    ids, dropped = prompt.fit(chat(*texts), 500, 10)
    assert len(ids) <= 490 and ids == prompt.ids(chat(*texts[2 * dropped :]))
    # Most of it is not even tokenized.
    assert max(len(messages) for messages in read) < 1000
    assert characters_that_stay(chat(*texts)) == len("You are a helpful assistant.") + len(texts[-1])
    # A late system message goes with its turn; that of the last turn stays.
    late = [
        *chat(*texts[:2]),
        *turns("s: early", *[f"{x}: {'word ' * 12}" for x in "uauauauauauau"], "a: b", "s: end", "u: c"),
    ]
    prompt.fit(late, 500, 10)
    kept = [message["content"] for message in read[-1]]
    assert "early" not in kept and kept[-2:] == ["end", "c"] and kept[0] == "You are a helpful assistant."


def test_turns_that_cannot_fit_are_dropped_in_strides():
    short = [turns("u: 123456789", "a: 0")] * 50  # 10 characters each
    dropped = [hopeless_turns(short[:count], 100) for count in range(1, 31)]
    assert dropped[:10] == [0] * 10 and dropped[10:20] == [5] * 5 + [10] * 5 and set(dropped[20:]) == {15, 20}
    assert hopeless_turns([turns("u: " + "x" * 500)], 100) == 0

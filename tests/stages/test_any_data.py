"""Rows of any form, with any roles and flags, under any template: what is trained is what the data say.

Each turn says a word of its own, so that each word can be followed from the file to the supervised tokens.
"""

import csv
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.common.chat import Chat
from stages.common.errors import StageError
from stages.conversations.messages import read_messages
from stages.tokenize import take_late_system, tokenize
from tests.support.chats import answer_spans
from tests.support.conversations import check_funnel, run
from tests.support.rows import write_jsonl
from tests.support.templates import SMALL, template_of, tokenizer_for

TEMPLATES = [*SMALL, "qwen2_5", "qwen3_training", "llama3", "gemma3", "phi3", "lfm2", "cohere2", "deepseekv3"]
NO_SYSTEM = ("no_system", "alternating")  # templates that refuse a conversation which begins with a system message
TEXTS = ["{}", " {}\n", "{} <|im_end|>", "<|stop|>{}", "日本 {}?", "{}\n\n```\na = 1\n```", "<b>{}</b> {{{{ x }}}}"]
WORD = re.compile(r"w\d+x\d+")
FLAGS: list[dict[str, Any]] = [{}, {}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"loss": False}]
MORE = [{"tool_calls": [{"id": "c"}]}, {"reasoning_content": "hm"}, {"weight": 0.5}, {"images": ["a.png"]}]
ROLES = ["user", "assistant", "user", "assistant", "system"]
ROLE_NAMES = {"user": ["user", "human"], "assistant": ["assistant", "gpt", "Model"], "system": ["system", "developer"]}
LISTS = [("messages", "role", "content"), ("conversations", "from", "value"), ("conversation", "role", "content")]
ANSWERS = ["chosen", "completion", "response"]  # the answer to a list of turns may stand in one of them
LABELS: list[Any] = [True, "True", 1, False, "False", 0]
PAIRS = [("instruction", "output"), ("question", "answer"), ("prompt", "completion"), ("prompt", "chosen")]


class Drawn(NamedTuple):
    """A turn before it is written in a form."""

    role: str
    text: str
    flags: dict[str, Any]


class DrawnRow(NamedTuple):
    row: dict[str, Any]
    words: list[str]  # in order; a system column goes first
    roles: list[str]  # of each
    trained: dict[str, bool]  # each answer's word: whether the data let it be trained on
    is_refused: bool  # holds more than text
    is_deleted: bool


tokenizer_of = cache(lambda name: tokenizer_for(template_of(name)))


def as_turn(draw, turn: Drawn, keys: tuple[str, str]) -> dict[str, Any]:
    parts = draw(st.booleans())
    content = [{"type": "text", "text": turn.text}] if parts else turn.text
    return {keys[0]: draw(st.sampled_from(ROLE_NAMES[turn.role])), keys[1]: content, **turn.flags}


def as_listed(draw, turns: list[Drawn]) -> dict[str, Any]:
    """A row with a column of turns, which may be a JSON string, and of which the last answer may stand beside it."""
    column, role, content = draw(st.sampled_from(LISTS))
    listed = [as_turn(draw, turn, (role, content)) for turn in turns]
    beside = {}
    if [turn.role for turn in turns[-2:]] == ["user", "assistant"] and draw(st.booleans()):
        answers = [listed[-1], listed[-1:], *([] if turns[-1].flags else [turns[-1].text])]
        beside[draw(st.sampled_from(ANSWERS))] = draw(st.sampled_from(answers))
        listed = listed[:-1]
    return {column: json.dumps(listed) if draw(st.booleans()) else listed, **beside}


def as_columns(draw, turns: list[Drawn]) -> dict[str, Any]:
    """A row of a history, a question and an answer; the turns alternate and have no flags. An answer that is a list may
    repeat the end of its prompt."""
    question, answer = draw(st.sampled_from(PAIRS))
    rejected = {"rejected": "No."} if answer == "chosen" else {}
    if draw(st.booleans()):
        before = [{"role": turn.role, "content": turn.text} for turn in turns[:-1]]
        repeated = draw(st.sampled_from([[], before[-1:], before]))
        return {question: before, answer: [*repeated, {"role": "assistant", "content": turns[-1].text}], **rejected}
    pairs = [[one.text, two.text] for one, two in zip(turns[:-2:2], turns[1:-2:2], strict=True)]
    return {question: turns[-2].text, answer: turns[-1].text, "history": pairs, **rejected}


def flags_of_row(draw, row: dict[str, Any], in_columns: bool) -> tuple[dict[str, Any], bool, bool]:
    """A row's own columns, whether its answers are trained on where they do not say so, and whether it is deleted."""
    flags = draw(st.sampled_from(FLAGS)) if draw(st.integers(0, 4)) == 0 else {}
    trained = all(flags.values())
    if in_columns and "chosen" not in row and draw(st.integers(0, 2)) == 0:
        label = draw(st.sampled_from(LABELS))
        flags, trained = {**flags, "label": label}, trained and label not in (False, "False")
    deleted = draw(st.sampled_from([*[None] * 8, *LABELS]))
    return flags | {"deleted": deleted}, trained, deleted in (True, "True")


@st.composite
def drawn_rows(draw, number: int) -> DrawnRow:
    in_columns = draw(st.booleans())
    if in_columns:
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    else:
        roles = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7))
    words = [f"w{number}x{i}" for i in range(len(roles))]
    texts = [draw(st.sampled_from(TEXTS)).format(word) for word in words]
    flags = [{} if in_columns else draw(st.sampled_from(FLAGS)) for _ in roles]
    is_refused = not in_columns and draw(st.integers(0, 9)) == 0
    if is_refused:
        flags[0] = draw(st.sampled_from(MORE))
    turns = [Drawn(*each) for each in zip(roles, texts, flags, strict=True)]
    row = as_columns(draw, turns) if in_columns else as_listed(draw, turns)
    prompt = next((row[name] for name, _ in PAIRS if name in row), None)
    if isinstance(prompt, str) and draw(st.booleans()):
        row[draw(st.sampled_from(["input", "context"]))] = context = f"w{number}x98"
        words, roles = [*words[:-1], context, words[-1]], [*roles[:-1], "user", roles[-1]]
    columns, default, is_deleted = flags_of_row(draw, row, in_columns)
    row |= columns
    if draw(st.integers(0, 2)) == 0:
        words, roles = [f"w{number}x99", *words], ["system", *roles]
        if isinstance(prompt, list) and draw(st.booleans()):
            prompt.insert(0, {"role": "system", "content": words[0]})
        else:
            row[draw(st.sampled_from(["system", "system_prompt"]))] = words[0]
    trained = {
        WORD.findall(turn.text)[0]: all(turn.flags.values()) if turn.flags else default
        for turn in turns
        if turn.role == "assistant"
    }
    return DrawnRow(row, words, roles, trained, is_refused, is_deleted)


def write(folder: Path, ending: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a train file, and a conversation of its own as the validation file."""
    other = [{"question": "held out?", "answer": "yes"}]
    write_jsonl(folder / "validation.jsonl", other)
    rows = [*rows, {"question": "never alone?", "answer": "never"}]
    if ending == "jsonl":
        write_jsonl(folder / "train.jsonl", rows)
    elif ending == "json":
        (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    else:
        with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            table.writeheader()
            for row in rows:
                table.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v is not None})


def lost_words(drawn: DrawnRow) -> set[str]:
    """What stands before the first question or behind the last answer. System messages before a question stay."""
    roles = drawn.roles
    first = next((i for i, role in enumerate(roles) if role == "user"), len(roles))
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
    greeting = {drawn.words[i] for i in range(first) if roles[i] == "assistant"}
    return greeting | set(drawn.words[last + 1 :])


def check_kept(drawn: DrawnRow, conversation: Any) -> None:
    """Each turn stands in its place, with its role; each answer is trained on where the data say so."""
    messages = list(conversation.messages)
    said = [(message["role"], word) for message in messages for word in WORD.findall(message["content"])]
    lost = lost_words(drawn)
    assert said == [(r, w) for r, w in zip(drawn.roles, drawn.words, strict=True) if w not in lost]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for answer, flag in zip(answers, conversation.trained, strict=True):
        assert {drawn.trained[word] for word in WORD.findall(answer)} == {flag}


def check_supervised(chat: Chat, tokenizer: Any, conversation: Any, row: Any) -> None:
    """As many supervised spans as trained answers; each says the answer's text, and then one end token."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = tokenizer.convert_tokens_to_ids(chat.end_tokens())
    answers = [m["content"] for m in chat.escaped(conversation.messages) if m["role"] == "assistant"]
    trained = [answer for answer, flag in zip(answers, conversation.trained, strict=True) if flag]
    for (start, stop), answer in zip(answer_spans(row.assistant_masks), trained, strict=True):
        *text, end = row.input_ids[start:stop]
        assert tokenizer.decode(text).strip() == answer.strip()
        assert end in ends and not special.intersection(text)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TEMPLATES), st.sampled_from(["jsonl", "json", "csv"]), st.data())
def test_what_is_trained_is_what_the_data_say(name, ending, data):
    drawn = [data.draw(drawn_rows(number)) for number in range(1, data.draw(st.integers(1, 5)) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), ending, [each.row for each in drawn])
        conversations, funnel = run(read_messages(Path(folder)), unsupported_rows="skip", max_bad_rows=0.0)
    check_funnel(funnel)
    kept = {row.message_tree_id: row for row in conversations.itertuples()}
    assert len(kept) == len(conversations)
    assert funnel["read"]["trees"] - len(kept) == sum(step["trees"] for step in funnel["dropped"].values())
    assert funnel["dropped"].get("unsupported", {"trees": 0})["trees"] >= sum(each.is_refused for each in drawn)
    for number, each in enumerate(drawn, 1):
        conversation = kept.get(f"train-{number}")
        if conversation is not None:
            assert not each.is_refused and not each.is_deleted
            check_kept(each, conversation)

    tokenizer = tokenizer_of(name)
    chat = Chat.of(tokenizer, name)
    takes, refused, _ = take_late_system(chat, conversations)
    if name in NO_SYSTEM and any(messages[0]["role"] == "system" for messages in takes["messages"]):
        with pytest.raises(StageError, match="it takes no such system message"):
            tokenize(takes, tokenizer, 100_000, name)
        return
    frame, counts = tokenize(takes, tokenizer, 100_000, name)
    assert len(frame) + len(refused) == len(conversations)
    assert counts["dropped"] == {"too_long": 0, "answers_cut_off": 0}
    for row in frame.itertuples():
        check_supervised(chat, tokenizer, kept[row.message_tree_id], row)

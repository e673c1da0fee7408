"""What is left out is said aloud: a table, a warning for a step that takes much, and the step that left nothing."""

import pytest

from stages.common.errors import StageError
from stages.common.left_out import aligned
from stages.common.schema import Params
from stages.conversations.filters import ALTERNATING, FILTERS, REPETITIONS, THREAD_FILTERS, VALID
from stages.conversations.left_out import PARAMETERS, left_out_table, left_out_warnings
from stages.tokenize import tokens_table, warnings_of
from tests.support.conversations import frame, run
from tests.support.rows import message


def trees(count: int, **fields) -> list[dict]:
    rows = [message(f"t{i}", role="prompter", **fields) for i in range(count)]
    return rows + [message(f"t{i}.a", f"t{i}", **fields) for i in range(count)]


def test_a_table_has_aligned_columns_and_the_stage_on_each_line():
    assert aligned([["", "messages"], ["read", 1234567], ["kept", 8]], "prepare") == [
        "prepare:        messages",
        "prepare: read  1,234,567",
        "prepare: kept          8",
    ]


def test_the_table_has_what_was_read_dropped_most_first_and_kept():
    rows = [*trees(20), message("l", role="prompter", lang="de"), message("l.a", "l", lang="de"), message("o", "gone")]
    _, funnel = run(rows, languages=["en"])
    words = [line.removeprefix("prepare: ").split("  ")[0] for line in left_out_table(funnel)]
    assert words == ["", "read", "dropped: language", "dropped: orphan", "kept: train", "kept: validation"]
    assert left_out_table(funnel)[2].split()[-2:] == ["2", "1"]  # messages, trees


def test_a_step_that_takes_more_than_a_tenth_is_a_warning_with_its_parameter():
    mixed = [*trees(18), *(message(f"l{i}", role="prompter", lang="de") for i in range(4))]
    assert left_out_warnings(run(mixed, languages=["en"])[1]) == []  # 4 of 40: a tenth is not more than a tenth
    mixed.append(message("l4", role="prompter", lang="de"))
    (line,) = left_out_warnings(run(mixed, languages=["en"])[1])
    assert line == "warning: prepare: language took 5 of 41 messages (12%). The parameter `languages` governs it."
    lone = [message(f"q{i}", role="prompter") for i in range(10)]
    (line,) = left_out_warnings(run([*trees(18), *lone])[1])
    assert line.endswith("unanswered_question took 10 of 46 messages (22%). docs/data.md explains it.")


def test_conversations_that_share_messages_are_counted_as_conversations():
    copies = [message(f"c{i}", role="prompter", text="same") for i in range(5)]
    answers = [message(f"c{i}.a", f"c{i}", text="same, too") for i in range(5)]
    (line,) = left_out_warnings(run([*trees(10), *copies, *answers])[1])
    assert "duplicate_conversation took 4 of 15 conversations (27%)" in line


def test_every_step_names_its_parameter_or_none():
    for filters in (VALID, FILTERS, ALTERNATING, THREAD_FILTERS, REPETITIONS):
        assert {reason for reason, *_ in filters} <= PARAMETERS.keys()
    assert {parameter for parameter in PARAMETERS.values() if parameter} <= Params.model_fields.keys()
    _, funnel = run(trees(4))
    assert funnel["dropped"].keys() <= PARAMETERS.keys()


def published(question: str) -> list[dict]:
    """Rows to train on that all ask one question, in several wordings of the answer."""
    return [row for i in range(2) for row in trees_of(f"p{i}", question, i)]


def trees_of(name: str, question: str, number: int) -> list[dict]:
    return [message(name, role="prompter", text=question), message(f"{name}.a", name, text=f"answer {number}")]


def test_nothing_left_names_held_out_questions_where_they_took_all_that_was_to_be_trained_on():
    held = [row for i in range(9) for row in trees_of(f"h{i}", f"question {i}", i)]
    table = frame([*published("Question 0"), *held])
    split = ["train" if row.startswith("p") else "validation" for row in table["message_id"]]
    with pytest.raises(StageError, match=r"left for train: .* 2 conversations, contain a question that is held out"):
        run(table.assign(split=split))


def counts(tokens: int, too_long_tokens: int, late_tokens: int = 0, **dropped: int) -> dict:
    return {
        **{"conversations": 9, "tokens": 99, "supervised_tokens": tokens, "control_tokens_escaped": 0},
        "supervised_tokens_lost": too_long_tokens + late_tokens,
        "supervised_tokens_lost_late_system": late_tokens,
        "supervised_share_lost": (too_long_tokens + late_tokens) / (tokens + too_long_tokens + late_tokens),
        "dropped": {"too_long": 0, "answers_cut_off": 0, "late_system": 0, **dropped},
    }


def test_tokenize_says_what_max_length_took():
    both = {"train": counts(1234, 66, too_long=1, answers_cut_off=2), "validation": counts(100, 0)}
    said = {line.split("  ")[0]: line.split()[-2:] for line in tokens_table(both, {"train": 10, "validation": 9})}
    assert said["tokenize: conversations read"] == ["10", "9"]
    assert said["tokenize: left out: too_long"] == ["1", "0"]
    assert said["tokenize: supervised tokens"] == ["1,234", "100"]
    assert said["tokenize: supervised tokens lost"] == ["66", "0"]
    assert said["tokenize: share of them lost"] == ["5.1%", "0.0%"]
    assert said["tokenize: answers cut off"] == ["2", "0"]
    assert warnings_of("train", both["train"], 10) == []
    late = counts(800, 50, 150, late_system=1)  # of 1,000: a tenth is max_length's only if it took it
    assert warnings_of("train", late, 10) == []
    much = counts(880, 120, too_long=2, late_system=3)
    assert warnings_of("train", much, 10) == [
        "warning: tokenize: train: too_long took 2 of 10 conversations (20%). The parameter `max_length` governs it.",
        "warning: tokenize: train: late_system took 3 of 10 conversations (30%). The parameter `chat_template` governs "
        "it.",
        "warning: tokenize: train: max_length took 120 of 1,000 supervised tokens (12%). The parameter `max_length` "
        "governs it.",
    ]

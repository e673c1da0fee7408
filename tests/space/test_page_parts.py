"""The parts of the page that need no browser: conversations, figures, progress, the card."""

import ast
import json
import re
import shlex
from dataclasses import replace

import pytest

from chatapp.page.answer_progress import Progress, progress, side_by_side
from chatapp.page.api_usage import usage
from chatapp.page.conversation import answer, as_messages, figures, last_question, question, stopped
from chatapp.page.kept_conversation import all_restored, restored
from chatapp.page.model_card import about, subtitle, title
from tests.support.chunks import chunks
from tests.support.scripted import EVALUATION


def test_the_models_never_read_the_line_of_figures():
    history = [question("one"), answer("two", "3 tokens …"), question("three"), answer("", "…")]
    assert as_messages(history, " Be brief. ") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert as_messages(history, "  ")[0] == {"role": "user", "content": "one"}
    assert [last_question(history, i) for i in range(4)] == [0, 0, 2, 2]
    assert stopped(history)[-1] == answer("", "stopped")
    assert stopped(history[:2])[-1] == answer("two", "3 tokens · stopped")
    complete = [question("one"), answer("two", "3 tokens")]
    assert stopped(complete) == complete


def test_figures_say_speed_limit_and_lost_turns():
    assert figures(Progress("a", 1, 0.01, None, "stop", 0)) == "1 token"
    assert figures(Progress("a", 2, 0.01, None, None, 0)) == "2 tokens …"  # it grows
    assert figures(Progress("a b", 20, 0.31, 41.26, "stop", 0)) == "20 tokens · 41.3 tokens/s · first token after 0.3 s"
    assert figures(Progress("a", 8, 0, 10.0, "length", 2)).endswith(
        "cut at max tokens · the 2 oldest turns did not fit: not read"
    )


def test_speed_is_that_at_which_tokens_were_made():
    made = [replace(chunk, seconds=0.5 + 0.25 * i) for i, chunk in enumerate(chunks(*"abcdef"))]
    states = list(progress(iter(made)))  # all at once, as to a reader who was away
    assert (states[-1].text, states[-1].tokens) == ("abcdef", 6)
    assert [state.tokens_per_second for state in states] == [None, 4, 4, 4, 4, 4] and states[-1].first_after == 0.5


def test_two_answers_grow_in_turns():
    states = list(side_by_side({"a": progress(iter(chunks(*"123"))), "b": progress(iter(chunks("x")))}))
    assert [{name: state.text for name, state in both.items()} for both in states] == [
        {"a": "1"},
        {"a": "1", "b": "x"},
        {"a": "12", "b": "x"},
        {"a": "123", "b": "x"},
    ]


def test_a_reload_gives_conversations_back_and_marks_what_it_interrupted():
    history = [question("one"), answer("two", "3 tokens …")]
    assert restored(json.loads(json.dumps(history))) == [question("one"), answer("two", "3 tokens · stopped")]
    assert restored([question("one"), answer("two", "3 tokens")])[-1] == answer("two", "3 tokens")
    for junk in (None, 7, "x", [1], [{"role": "user"}], [{"role": "user", "content": [{"text": 1}]}], {"a": 1}):
        assert restored(junk) == []


def test_a_reload_gives_conversations_with_the_same_questions_back():
    base, tuned = ([question("one"), answer(name, "3 tokens")] for name in ("base", "tuned"))
    assert all_restored({"base": base, "tuned": tuned}, ["base", "tuned"]) == [base, tuned]
    for junk in (None, [], {"base": base}, {"base": base, "tuned": [*tuned, question("two")]}):
        assert all_restored(junk, ["base", "tuned"]) == [[], []]


def test_a_card_shows_what_it_holds_and_nothing_else():
    card = {
        "name": "tuned",
        "base_model": {"source": "microsoft/phi-2", "revision": "ef38", "license": "mit"},
        "datasets": [{"source": "file:data/sample/oasst_sample.jsonl", "revision": None, "license": "<b>"}],
        "training": {"params": {"lora_r": 16, "languages": ["en", "de"]}, "train_conversations": 3},
        "export": {"export_precision": "int4"},
        "held_out": {"conversations": 2, "supervised_tokens": 9},
        "quality": {"perplexity": 9.876, "bytes": 2_000_000},
    }
    assert title(card) == "phi-2, tuned" and "oasst_sample · int4" in subtitle(card)
    page = about({"tuned": card, "base": {"name": "base", "quality": {"perplexity": 10}}})
    for line in ("| perplexity | 10.00 | 9.88 |", "| size, MB | – | 2 |", "| languages | `en, de` |", "`ef38`"):
        assert line in page
    assert "<b>" not in page
    assert (title({}), about({"tuned": {}})) == ("Chat", "")
    assert title({"base_model": {"source": "Qwen/Qwen2.5-0.5B"}}) == "Qwen2.5-0.5B, tuned"


def test_about_shows_the_figures_that_the_project_reports_and_no_others():
    """The perplexities of the README, the interval, and what perplexity means."""
    quality = {"perplexity": 12.3731, "perplexity_before": 12.2857, "token_accuracy": 0.478, "bytes": 173_700_000}
    cards = {"tuned": {"quality": quality}, "base": {"name": "base", "quality": {"perplexity": 17.01}}}
    page = about(cards, "", EVALUATION)
    assert "| | base | tuned | tuned, exported |" in page and "| perplexity | 16.68 | 12.29 | 12.37 |" in page
    assert "19 held-out conversations, 2569 tokens" in page
    assert "tuned minus base: -0.306, 95 % interval [-0.362, -0.245]. The interval excludes zero." in page
    assert page.count("Perplexity:") == 1 and "17.01" not in page
    unclear = {**EVALUATION, "difference": {**EVALUATION["difference"], "significant": False}}
    assert "includes zero" in about(cards, "", unclear)
    alone = about({"tuned": cards["tuned"]}, "", EVALUATION)  # no base was exported
    assert "| perplexity | 16.68 | 12.29 | 12.37 |" in alone


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_usage_of_the_api_is_that_of_this_address(needs_key):
    text = usage("https://ada-chat.hf.space", ["tuned", "base"], needs_key)
    assert 'base_url="https://ada-chat.hf.space/v1"' in text
    assert ("(https://ada-chat.hf.space/v1/models)" in text) == (not needs_key)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
        assert f'api_key="{"KEY" if needs_key else "none"}"' in block
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    words = shlex.split(command.replace("\\\n", ""))
    assert json.loads(words[-1])["model"] == "tuned"
    assert ("Authorization: Bearer KEY" in words) == needs_key

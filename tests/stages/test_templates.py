"""Any chat template: each answer is supervised up to the token that closes it, or the template is refused by name."""

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.common.chat import Chat, ChatError, Encoded, check_same_ids, plain_template, rendered_by
from stages.common.errors import StageError
from stages.tokenize import print_notes
from tests.support.templates import (
    PAGE,
    SMALL,
    TRAINING,
    TRL_TEMPLATES,
    chat_of,
    page,
    row,
    talk,
    template_of,
    tokenizer_for,
)

CODE = "```python\ndef add(a, b):\n    return a + b\n```"
TALKS = [
    talk("What is 1 + 1?", "It is 2."),
    talk("  And\n", "\n Paris \n\n", "Code!", CODE, "日本?", "はい 🙂"),
]
WITH_SYSTEM = [[{"role": "system", "content": " Be kind.\n"}, *messages] for messages in TALKS]

REASONS = {
    "gptoss": r"it writes the date \(strftime_now",
    "llama3_2": r"it writes the date \(strftime_now",
    "muse_glimmer": r"it writes the date \(strftime_now",
    "idefics3": "does not write the content of user messages",
    "smolvlm": "does not write the content of user messages",
    "llava_next": "but parts, as for images",
}
REFUSED = {name: REASONS.get(name.removesuffix("_training")) for name in TRL_TEMPLATES}
REFUSED["glm4moe"] = "an answer is followed by '', which is no special token"  # TRL's form of it closes answers
REFUSED = {name: reason for name, reason in REFUSED.items() if reason}
NO_SYSTEM = ("gemma", "gemma_training", "no_system", "alternating")
ACCEPTED = [name for name in (*TRL_TEMPLATES, *SMALL) if name not in REFUSED]


tokenizer_of = cache(lambda name: tokenizer_for(template_of(name)))


def check_spans(name: str, messages: list[dict[str, str]]) -> Encoded:
    """Each answer has a span: its text, and then one special token, the only one in it."""
    chat, tokenizer = chat_of(name), tokenizer_of(name)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    (encoded,) = chat.encode([messages])
    answers = [m["content"] for m in chat.escaped(messages) if m["role"] == "assistant"]
    ends = tokenizer.convert_tokens_to_ids(chat.end_tokens())
    for (start, stop), answer in zip(encoded.spans, answers, strict=True):
        *text, end = encoded.ids[start:stop]
        assert tokenizer.decode(text).strip() == answer.strip()
        assert end in ends and not special.intersection(text)
    return encoded


def test_all_of_trls_training_templates_are_here():
    assert len(TRAINING) == 31  # of TRL 1.16; with another number, look at docs/templates.md
    assert {f"{name}_training" for name in REASONS} - {"llama3_2_training"} == REFUSED.keys() & set(TRAINING)


@pytest.mark.parametrize("name", ACCEPTED)
def test_each_answer_is_supervised_up_to_the_token_that_closes_it(name):
    for messages in TALKS:
        check_spans(name, messages)
    for messages in WITH_SYSTEM:
        if name in NO_SYSTEM:
            with pytest.raises(ChatError, match=rf'{name}: it takes no such system message .*Set system_prompt: ""'):
                chat_of(name).encode([messages])
        else:
            check_spans(name, messages)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_in_one_line_that_says_why(name):
    with pytest.raises(StageError, match=f"^{name}: .*{REFUSED[name]}") as error:
        chat_of(name).end_tokens()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_transformers_reads_the_template_with_and_without_its_marks_alike(name):
    tokenizer = tokenizer_for(template_of(name))
    chat = Chat.of(tokenizer, name)
    check_same_ids(chat, rendered_by(tokenizer), "with marks")
    tokenizer.chat_template = plain_template(template_of(name))
    assert not re.search(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", tokenizer.chat_template)
    check_same_ids(chat, rendered_by(tokenizer), "without marks")


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_prompt_is_the_beginning_of_what_was_trained_or_it_is_said(name):
    chat = chat_of(name)
    messages = TALKS[0]
    prompt = chat.ids(messages[:-1])
    (encoded,) = chat.encode([messages])
    assert bool(chat.notes() + chat.warnings()) == (encoded.ids[: encoded.spans[0][0]] != prompt)


@pytest.mark.parametrize("name", ["deepseekv3", "nemotron_3_nano"])
def test_a_prompt_that_differs_from_the_training_text_is_a_warning_on_stderr(name, capsys):
    print_notes(chat_of(name))
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: tokenize: {name}: a prompt ends with ") and said.err.count("\n") == 1
    assert "a prompt ends with" not in said.out
    assert row(name).startswith(f"| {name} | right, but its prompt differs | ")


def test_what_a_template_writes_before_an_answer_is_no_warning(capsys):
    print_notes(chat_of("words_before_an_answer"))
    said = capsys.readouterr()
    assert "context, not trained on" in said.out and not said.err


def test_the_table_in_docs_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.support.templates"


letters = st.characters(codec="utf-8", exclude_categories=["Co"])
pieces = st.one_of(
    st.text(letters, max_size=12),
    st.sampled_from(
        ["\n", "  ", "\t", " \n ", "\u2003", "?", ":", CODE, "日本語", "e\u0301", "👩‍👩‍👧", "{{ x }}", "</i>"]
    ),
    st.sampled_from(["<think>\nwell\n</think>\n\n", "<think>", "</think>", "<tool_response>", "/nothink"]),
    st.sampled_from(["<|im_end|>", "<|stop|>", "<|endoftext|>", "<bos>", "<end_of_turn>", "<|im_<|im_end|>end|>"]),
)
contents = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(ACCEPTED),
    st.none() | contents,
    st.lists(contents, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0),
)
def test_any_conversation_is_right_or_refused_in_one_line(name, system, turns):
    chat = chat_of(name)
    try:
        encoded = check_spans(name, talk(*turns, system=system))
    except ChatError as error:
        assert "\n" not in str(error) and error.row == 0
        reasons = ["takes no such system message", "belongs both to"]
        reasons += ["it rewrites"] if any("think>" in turn for turn in turns) else []
        assert any(reason in str(error) for reason in reasons), error
    else:
        assert chat.ids(talk(*turns, system=system), prompt=False) == encoded.ids
        tokens = [str(token) for token in tokenizer_of(name).added_tokens_decoder.values() if token.special]
        spelt = any(token in text for token in tokens for text in (*turns, system or ""))
        assert encoded.escaped == spelt

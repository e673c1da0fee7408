"""Chat templates to tokens: exact ids and masks, complete turns only, an end token that is learnt."""

from pathlib import Path

import pandas as pd
import pytest
import trl
from transformers import AutoTokenizer

from stages.common.chat import Chat, Encoded
from stages.common.errors import StageError
from stages.common.truncation import cut_to_turns
from stages.tokenize import load_template, set_special_tokens, take_late_system, tokenize
from tests.support.chats import answer_spans
from tests.support.templates import LOOP, PROMPT, SMALL, TURN, tokenizer_for

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Paris"},
]


@pytest.fixture
def llama(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    set_special_tokens(tokenizer, load_template("chatml", tokenizer), len(tokenizer))
    return tokenizer


@pytest.fixture
def phi(tiny_phi):
    tokenizer = AutoTokenizer.from_pretrained(tiny_phi)
    set_special_tokens(tokenizer, load_template("phi2", tokenizer), len(tokenizer) + 8)
    return tokenizer


def encode(tokenizer, messages) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a conversation and the spans of its answers."""
    (encoded,) = Chat.of(tokenizer).encode([messages])
    return encoded.ids, encoded.spans


def supervised(tokenizer, messages) -> list[str]:
    ids, spans = encode(tokenizer, messages)
    return [tokenizer.decode(ids[start:end]) for start, end in spans]


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_prompt_is_the_exact_beginning_of_what_was_trained(name, request):
    tokenizer = request.getfixturevalue(name)
    prompt = tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids, spans = encode(tokenizer, TALK)
    assert prompt == ids[: spans[1][0]]


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_only_answers_and_their_end_tokens_are_supervised(name, request):
    tokenizer = request.getfixturevalue(name)
    end = tokenizer.eos_token
    assert [text.strip() for text in supervised(tokenizer, TALK)] == [f"It is 2.{end}", f"Paris{end}"]


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_padding_is_not_the_end_token(name, request):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_without_a_token_to_spare_padding_shares_the_end_token_but_no_letter_is_touched(tiny_phi, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_phi)
    size = len(tokenizer)
    set_special_tokens(tokenizer, load_template("phi2", tokenizer), size)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == size and again.pad_token_id == again.eos_token_id
    assert again.decode(again.encode("Hi! You!"), skip_special_tokens=True) == "Hi! You!"


def test_templates_that_do_not_fit_are_refused(tiny_phi, tmp_path, monkeypatch):
    phi = AutoTokenizer.from_pretrained(tiny_phi)
    with pytest.raises(StageError, match="no special token of the"):
        set_special_tokens(phi, load_template("chatml", phi), 1000)
    with pytest.raises(StageError, match="has no chat template"):
        load_template("model", AutoTokenizer.from_pretrained(tiny_phi))
    with pytest.raises(StageError, match="does not exist. Set it to one of: chatml, phi2, model"):
        load_template("none", phi)
    monkeypatch.setattr("stages.tokenize.TEMPLATES", tmp_path)
    (tmp_path / "bare.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(StageError, match="^mine: it does not write the content of assistant messages"):
        set_special_tokens(phi, load_template("bare", phi), 1000, "mine")


@pytest.mark.parametrize("known", ["qwen2_5.jinja", "qwen3.jinja", "llama3.jinja"])
def test_a_models_own_template_gets_its_marks_and_its_end_token(known, tiny_llama):
    own = Path(trl.__file__).parent / "chat_templates" / known
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    if "llama3" in known:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
        )
    tokenizer.chat_template = own.read_text(encoding="utf-8")
    set_special_tokens(tokenizer, load_template("model", tokenizer), len(tokenizer))
    end = "<|eot_id|>" if "llama3" in known else "<|im_end|>"
    assert tokenizer.eos_token == end and tokenizer.pad_token != end
    assert supervised(tokenizer, TALK) == [f"It is 2.{end}", f"Paris{end}"]


def cut(encoded: Encoded, trained: list[bool], max_length: int) -> tuple:
    found = cut_to_turns(encoded, trained, max_length)
    return found.ids, found.mask.tolist(), found.lost, found.trained


def test_cutting_keeps_complete_turns():
    ids = list(range(100, 112))
    mask = [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0]
    encoded = Encoded(ids, [(2, 4), (6, 9), (10, 11)], escaped=False)
    both = [True, True, True]
    for length, kept, lost, trained in ((12, 11, 0, 3), (10, 9, 1, 2), (9, 9, 1, 2), (8, 4, 2, 1)):
        assert cut(encoded, both, length) == (ids[:kept], mask[:kept], lost, trained)
    assert cut_to_turns(encoded, both, 3) is None
    assert cut(encoded, [False, True, True], 12) == (ids[:11], [0] * 6 + [1, 1, 1, 0, 1], 0, 2)
    assert cut_to_turns(encoded, [False, True, True], 8) is None  # nothing left to train on
    side_by_side = Encoded(ids, [(2, 4), (4, 6)], escaped=False)
    assert cut(side_by_side, [True, True], 5) == (ids[:4], [0, 0, 1, 1], 1, 1)


def conversations(talks: list[list[dict]]) -> pd.DataFrame:
    answers = [[True] * sum(m["role"] == "assistant" for m in talk) for talk in talks]
    return pd.DataFrame({"messages": talks, "trained": answers, "lang": "en", "message_tree_id": "t"})


def test_counts_and_what_is_dropped(llama):
    hostile = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]
    long = [{"role": "user", "content": "why? " * 100}, {"role": "assistant", "content": "no"}]
    whole = encode(llama, TALK)[1][-1][1]  # without the line break after the last end token
    frame, counts = tokenize(conversations([TALK, hostile, long, TALK[1:3]]), llama, whole - 1)
    assert counts["dropped"] == {
        "too_long": 1,
        "answers_cut_off": 1,
    }
    assert counts["conversations"] == len(frame) == 3 and counts["control_tokens_escaped"] == 1
    assert counts["tokens"] == sum(len(ids) for ids in frame["input_ids"]) == frame["length"].sum()
    assert counts["supervised_tokens"] == sum(sum(mask) for mask in frame["assistant_masks"])
    assert list(frame["length"]) == [len(ids) for ids in frame["input_ids"]]
    for ids, mask in zip(frame["input_ids"], frame["assistant_masks"], strict=True):
        assert ids[-1] == llama.eos_token_id and mask[-1] == 1 and len(ids) == len(mask)


def test_a_conversation_that_cannot_be_aligned_is_named_by_row_and_tree():
    tokenizer = tokenizer_for(SMALL["no_system"])
    with pytest.raises(
        StageError, match=r"^chat_template: mine: it takes no such system message .*\(conversation 1, of "
    ):
        tokenize(conversations([TALK[1:], TALK]), tokenizer, 100, "chat_template: mine")
    table = conversations([TALK[1:]]).assign(trained=[[True]])
    with pytest.raises(StageError, match="conversation 0 has 2 answers, but says of 1 whether"):
        tokenize(table, tokenizer, 100)


def test_a_late_system_message_keeps_its_place_or_its_conversation_is_counted():
    late = [*TALK[1:3], {"role": "system", "content": "In French."}, *TALK[3:]]
    table = conversations([TALK[1:], late])
    tokenizer = tokenizer_for(SMALL["alternating"])
    kept, refused, lost = take_late_system(Chat.of(tokenizer, "mine"), table)
    assert list(kept.index) == [0] and len(refused) == 1
    _, without_it = tokenize(kept, tokenizer, 100)
    assert lost == without_it["supervised_tokens"] > 0  # the same answers
    _, counts = tokenize(kept, tokenizer, 100, late=lost)
    assert counts["supervised_tokens_lost"] == counts["supervised_tokens_lost_late_system"] == lost
    assert counts["supervised_share_lost"] == 0.5
    untrained = table.assign(trained=[[True, True], [False, True]])
    assert 0 < take_late_system(Chat.of(tokenizer, "mine"), untrained)[2] < lost
    assert refused[0].startswith("mine: it takes no such system message (Roles must alternate).")
    assert "(conversation 1, of tree " in refused[0]
    with pytest.raises(StageError, match=r"it takes no such system message .* \(conversation 0, of "):
        tokenize(conversations([[TALK[0], *late]]), tokenizer, 100)  # the first system message is an error
    assert take_late_system(Chat.of(tokenizer, "mine"), conversations([[TALK[0], *late]]))[1] == []

    tokenizer = tokenizer_for(LOOP + TURN + PROMPT)
    kept, refused, lost = take_late_system(Chat.of(tokenizer, "mine"), table)
    assert list(kept.index) == [0, 1] and not refused and lost == 0
    frame, _ = tokenize(kept, tokenizer, 100)
    text = tokenizer.decode(frame["input_ids"][1])
    assert "It is 2.<|im_end|>\n<|im_start|>system\nIn French.<|im_end|>\n<|im_start|>user" in text
    assert len(answer_spans(frame["assistant_masks"][1])) == 2


def test_a_template_that_moves_a_late_system_message_to_the_front_is_found_out():
    front = "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
    others = "{% for m in messages if m.role != 'system' %}"
    late = [*TALK[1:3], TALK[0], *TALK[3:]]
    chat = Chat.of(tokenizer_for(front + others + TURN + PROMPT), "mine")
    assert chat.why_not(TALK) is None
    assert "mine: it moves a system message in front of what was said before it" in str(chat.why_not(late))


def test_every_answer_of_many_batches_is_supervised_and_no_other_is():
    tokenizer = tokenizer_for(LOOP + TURN + PROMPT)
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] * 2 for i in range(600)]
    table = conversations(talks).assign(trained=[[False, True]] * 600)
    frame, counts = tokenize(table, tokenizer, 200)
    for i, (ids, mask) in enumerate(zip(frame["input_ids"], frame["assistant_masks"], strict=True)):
        (span,) = answer_spans(mask)
        assert tokenizer.decode(ids[slice(*span)]) == f"{i}!<|im_end|>" and span[1] == len(ids)
    assert counts["dropped"] == {"too_long": 0, "answers_cut_off": 0}

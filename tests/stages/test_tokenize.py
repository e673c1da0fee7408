"""Chat templates to tokens: exact ids and masks, complete turns only, an end token that is learnt."""

from pathlib import Path

import pandas as pd
import pytest
import trl
from transformers import AutoTokenizer

from stages.common.errors import StageError
from stages.common.masks import answer_spans
from stages.merge import plain_template
from stages.tokenize import cut_to_turns, encode, load_template, set_special_tokens, tokenize

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


def supervised(tokenizer, ids, mask) -> list[str]:
    return [tokenizer.decode(ids[start:end]) for start, end in answer_spans(mask)]


def expected_ids(tokenizer, parts):
    """The ids and mask of text parts, each encoded by itself and given with whether it is the assistant's."""
    ids, mask = [], []
    for text, wanted in parts:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        mask += [int(wanted)] * len(piece)
    return ids, mask


def test_chatml_exact_text_ids_and_mask(llama):
    assert llama.apply_chat_template(TALK, tokenize=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 2.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>\n"
    )
    expected = expected_ids(
        llama,
        [
            ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("It is 2.<|im_end|>", True),
            ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
            ("Paris<|im_end|>", True),
            ("\n", False),
        ],
    )
    assert encode(llama, [TALK])[0] == expected


def test_phi2_exact_text_ids_and_mask(phi):
    assert phi.apply_chat_template(TALK, tokenize=False) == (
        "Be kind.\nInstruct: What is 1 + 1?\nOutput: It is 2.<|endoftext|>\n"
        "Instruct: And?\nOutput: Paris<|endoftext|>\n"
    )
    expected = expected_ids(
        phi,
        [
            ("Be kind.\nInstruct: What is 1 + 1?\nOutput:", False),
            (" It is 2.<|endoftext|>", True),
            ("\nInstruct: And?\nOutput:", False),
            (" Paris<|endoftext|>", True),
            ("\n", False),
        ],
    )
    assert encode(phi, [TALK])[0] == expected


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_prompt_is_the_exact_beginning_of_what_was_trained(name, request):
    tokenizer = request.getfixturevalue(name)
    prompt = tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids, mask = encode(tokenizer, [TALK])[0]
    assert prompt == ids[: answer_spans(mask)[1][0]]


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_only_answers_and_their_end_tokens_are_supervised(name, request):
    tokenizer = request.getfixturevalue(name)
    ids, mask = encode(tokenizer, [TALK])[0]
    end = tokenizer.eos_token
    assert [text.strip() for text in supervised(tokenizer, ids, mask)] == [f"It is 2.{end}", f"Paris{end}"]


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


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_the_plain_template_renders_the_same_text(name, request):
    tokenizer = request.getfixturevalue(name)
    plain = plain_template(tokenizer.chat_template)
    assert "generation %}" not in plain.replace("add_generation_prompt", "")
    for talk, prompt in ((TALK, False), (TALK[:4], True), (TALK[1:2], True)):
        same = {"tokenize": False, "add_generation_prompt": prompt}
        assert tokenizer.apply_chat_template(talk, chat_template=plain, **same) == tokenizer.apply_chat_template(
            talk, **same
        )


def test_templates_that_do_not_fit_are_refused(tiny_phi, tmp_path, monkeypatch):
    phi = AutoTokenizer.from_pretrained(tiny_phi)
    with pytest.raises(StageError, match="no special token of the"):
        set_special_tokens(phi, load_template("chatml", phi), 1000)
    with pytest.raises(StageError, match="has no chat template"):
        load_template("model", AutoTokenizer.from_pretrained(tiny_phi))
    with pytest.raises(StageError, match="does not exist. Set it to one of: chatml, phi2, model"):
        load_template("none", phi)
    monkeypatch.setattr("stages.tokenize.TEMPLATES", tmp_path)
    (tmp_path / "bare.jinja").write_text("{{ messages[0].content }}{% if add_generation_prompt %}{% endif %}")
    with pytest.raises(StageError, match="no {% generation %} marks"):
        load_template("bare", phi)


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
    ids, mask = encode(tokenizer, [TALK])[0]
    end = "<|eot_id|>" if "llama3" in known else "<|im_end|>"
    assert tokenizer.eos_token == end and tokenizer.pad_token != end
    assert [text.split("</think>")[-1].strip() for text in supervised(tokenizer, ids, mask)] == [
        f"It is 2.{end}",
        f"Paris{end}",
    ]


def test_cutting_keeps_complete_turns():
    ids = list(range(100, 112))
    mask = [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0]
    both = [True, True, True]
    assert cut_to_turns(ids, mask, both, 12) == (ids[:11], mask[:11], 0)
    assert cut_to_turns(ids, mask, both, 10) == (ids[:9], mask[:9], 1)
    assert cut_to_turns(ids, mask, both, 9) == (ids[:9], mask[:9], 1)
    assert cut_to_turns(ids, mask, both, 8) == (ids[:4], mask[:4], 2)
    assert cut_to_turns(ids, mask, both, 3) is None
    assert cut_to_turns(ids, mask, [False, True, True], 12) == (ids[:11], [0] * 6 + [1, 1, 1, 0, 1], 0)
    assert cut_to_turns(ids, mask, [False, True, True], 8) is None  # nothing left to train on


def conversations(talks: list[list[dict]]) -> pd.DataFrame:
    answers = [[True] * sum(m["role"] == "assistant" for m in talk) for talk in talks]
    return pd.DataFrame({"messages": talks, "trained": answers, "lang": "en", "message_tree_id": "t"})


def test_counts_and_what_is_dropped(llama):
    hostile = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]
    long = [{"role": "user", "content": "why? " * 100}, {"role": "assistant", "content": "no"}]
    whole = len(encode(llama, [TALK])[0][0]) - 1  # less the line break after the last end token
    frame, counts = tokenize(conversations([TALK, hostile, long, TALK[1:3]]), llama, whole - 1)
    assert counts["dropped"] == {
        "control_tokens_in_text": 1,
        "first_answer_beyond_max_length": 1,
        "answers_cut_off": 1,
    }
    assert counts["conversations"] == len(frame) == 2
    assert counts["tokens"] == sum(len(ids) for ids in frame["input_ids"]) == frame["length"].sum()
    assert counts["supervised_tokens"] == sum(sum(mask) for mask in frame["assistant_masks"])
    assert list(frame["length"]) == [len(ids) for ids in frame["input_ids"]]
    for ids, mask in zip(frame["input_ids"], frame["assistant_masks"], strict=True):
        assert ids[-1] == llama.eos_token_id and mask[-1] == 1 and len(ids) == len(mask)

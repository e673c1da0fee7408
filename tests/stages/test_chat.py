"""Conversations to tokens: exact ids and spans, and one line where it cannot be."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from stages.common.chat import Chat, ChatError
from stages.common.chat.tokens import Tokens
from stages.common.errors import StageError
from stages.tokenize import load_template, set_special_tokens
from tests.support.models import CORPUS
from tests.support.templates import LOOP, PROMPT, SMALL, TURN, chat_of, talk, tokenizer_for

TALK = talk("What is 1 + 1?", "It is 2.", "And?", "Paris", system="Be kind.")
BARE = LOOP + "{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
THINK = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + PROMPT
)


def chat_for(template: str) -> Chat:
    return Chat.of(tokenizer_for(template), "mine")


def said(chat: Chat, template: str, messages: list[dict[str, str]]) -> list[str]:
    """What is supervised, answer by answer."""
    (encoded,) = chat.encode([messages])
    tokenizer = tokenizer_for(template)
    return [tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.spans]


def by_parts(tokenizer, parts: list[tuple[str, bool]]) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of text parts, each encoded by itself, and the spans of those that are the assistant's."""
    ids: list[int] = []
    spans = []
    for text, supervised in parts:
        start = len(ids)
        ids += tokenizer.encode(text, add_special_tokens=False)
        if supervised:
            spans.append((start, len(ids)))
    return ids, spans


def test_chatml_exact_ids_and_spans(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    set_special_tokens(tokenizer, load_template("chatml", tokenizer), len(tokenizer))
    expected = by_parts(
        tokenizer,
        [
            ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("It is 2.<|im_end|>", True),
            ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
            ("Paris<|im_end|>", True),
            ("\n", False),
        ],
    )
    assert Chat.of(tokenizer).encode([TALK])[0][:2] == expected


@pytest.mark.parametrize("answer", ["Paris", "日本", "- 1", "'s"])
def test_phi2_exact_ids_and_spans(tiny_phi, answer):
    """The space before an answer belongs to it, as a part of its first word or as a token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_phi)
    set_special_tokens(tokenizer, load_template("phi2", tokenizer), len(tokenizer) + 8)
    expected = by_parts(
        tokenizer,
        [
            ("Be kind.\nInstruct: What is 1 + 1?\nOutput:", False),
            (" It is 2.<|endoftext|>", True),
            ("\nInstruct: And?\nOutput:", False),
            (f" {answer}<|endoftext|>", True),
            ("\n", False),
        ],
    )
    assert Chat.of(tokenizer).encode([[*TALK[:-1], {"role": "assistant", "content": answer}]])[0][:2] == expected


@pytest.mark.parametrize(
    "name, expected",
    {
        "an_end_for_each_position": [" A \n<|im_end|>", "\nB<|stop|>"],
        "marks_on_lines": [" A \n<|stop|>", "\nB<|stop|>"],
        "marks_with_signs": [" A \n<|im_end|>", "\nB<|im_end|>"],
        "begins_with_bos": [" A \n<|im_end|>", "\nB<|im_end|>"],
        "strips": ["A<|im_end|>", "B<|im_end|>"],
        "strips_line_breaks": [" A <|im_end|>", "B<|im_end|>"],
        "strips_left": ["A \n<|im_end|>", "B<|im_end|>"],
        "space_before_end": [" A \n \n<|im_end|>", "\nB \n<|im_end|>"],
        "system_in_last_question": [" A \n<|im_end|>", "\nB<|im_end|>"],
        "words_before_an_answer": [" A \n<|im_end|>", "\nB<|im_end|>"],
    }.items(),
)
def test_what_is_supervised_with_each_small_template(name, expected):
    assert said(chat_of(name), SMALL[name], talk("Q", " A \n", "?", "\nB")) == expected


def test_a_space_belongs_to_the_word_behind_it_and_a_letter_is_never_shared():
    spaced = BARE.replace(":{{", ": {{")
    assert said(chat_for(spaced), spaced, talk("Q", "is")) == [" is<|im_end|>"]
    glued = BARE.replace(":{{", " o{{").replace("assistant:", "assistant o")  # "of" is one token
    with pytest.raises(
        ChatError, match=r"^mine: the token ' of?' belongs both to the prompt and to the answer 'f'"
    ) as e:
        chat_for(glued).encode([talk("Q", "A"), talk("Q", "f")])
    assert e.value.row == 1


@pytest.mark.parametrize("name", SMALL)
def test_one_skeleton_holds_for_all_conversations_of_the_same_roles(name, monkeypatch):
    """The other ways to find answers cost a rendering for each conversation, or for each answer."""
    monkeypatch.setattr("stages.common.chat.chat.find_by_prompts", None)
    chat = chat_of(name)
    chat.encode([talk(f"{i}? ", f"\n {i} \n", f"\n{i}", f" {i}\n") for i in range(9)])
    assert len(chat._skeletons) < 9


def test_a_tokenizer_that_rewrites_text_and_decodes_in_its_own_way():
    """Words instead of bytes, composed characters, and no token for some."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(["How is the caf\u00e9 ?", *CORPUS], trainers.BpeTrainer(special_tokens=special))
    chat = Chat(tokenizer, LOOP + TURN + PROMPT, {}, "mine")
    (encoded,) = chat.encode([talk("How is it?", "How is the cafe\u0301 ?", "Why?", "\u65e5 soft")])
    answers = [tokenizer.decode(encoded.ids[a:b], skip_special_tokens=False).strip() for a, b in encoded.spans]
    assert [answer.removesuffix("<|im_end|>").strip() for answer in answers] == ["How is the caf\u00e9 ?", "<unk> soft"]


@pytest.mark.parametrize("shift", [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_spans_that_are_off_by_a_token_are_found_out(shift, monkeypatch):
    find = Tokens.find

    def shifted(*args):
        return [answer._replace(start=answer.start + shift[0], stop=answer.stop + shift[1]) for answer in find(*args)]

    monkeypatch.setattr(Tokens, "find", shifted)
    with pytest.raises(ChatError, match="^mine: an answer's tokens say .* where .* was expected"):
        chat_for(LOOP + TURN + PROMPT).encode([talk("Q", "It is 2.")])


def test_a_special_token_that_takes_the_space_behind_it_does_not_take_the_answer():
    tokenizer = tokenizer_for(LOOP + TURN + PROMPT)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>assistant", rstrip=True)]})
    (encoded,) = Chat.of(tokenizer).encode([talk("Q", "  It is 2.", "Q", "Paris")])
    assert [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans] == ["It is 2.<|im_end|>", "Paris<|im_end|>"]


def test_reasoning_in_an_answer_is_trained_where_the_template_keeps_it_as_it_is():
    whole = "<think>\nOne and one.\n</think>\n\n2"
    assert said(chat_for(THINK), THINK, talk("1 + 1?", whole)) == [f"{whole}<|im_end|>"]
    with pytest.raises(
        ChatError, match=r"mine: it rewrites answer 2: .*'.*<think>.nOne.*' where '.*One.*' was expected"
    ):
        chat_for(THINK).encode([talk("1 + 1?", "2", "Why?", "<think>One</think>2")])


ENDIF = TURN.replace("{% endfor %}", "{% endif %}{% endfor %}")
REFUSED = {
    "no end": (LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}",
               "followed by '.nuser: ', which is no special token of"),
    "an end at the last one only": (LOOP + "{{ m.role }}: {{ m.content }}{{ '<|stop|>' if loop.last }}{% endfor %}",
                                         "which is no special token"),
    "drops the system message": (LOOP + "{% if m.role != 'system' %}" + ENDIF,
                                 'does not write the content of system messages .*Set system_prompt: ""'),
    "drops what was said": (LOOP + "{% if loop.first or m.content != messages[loop.index0 - 1].content %}" + ENDIF,
                            "it rewrites answer 1"),
    "answers in another order": ("{% for m in messages | reverse %}" + TURN, "in another order"),
    "capital letters": (LOOP + TURN.replace("m.content", "m.content | upper"), "rewrites or drops the system's text"),
    "parts": (LOOP + TURN.replace("m.content", "m.content.text.strip()"), "takes no plain text as content"),
    "no system": (SMALL["no_system"], r'takes no such system message \(No system role\). Set system_prompt: ""'),
    "roles": (SMALL["alternating"].replace("'user'", "'assistant'"), "refuses messages of system, user, assistant"),
    "the date": ("{{ strftime_now('%d') }}" + LOOP + TURN, r"it writes the date \(strftime_now\('%d'\)\)"),
    "no Jinja": ("{% for m in messages %}", "no valid Jinja template: line 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_template_cannot_say_is_one_line_that_names_it(kind):
    template, reason = REFUSED[kind]
    messages = talk("Hello", "Hello", "Bye", "Hello", system="Be brief.")
    with pytest.raises(StageError, match=f"^mine:? .*{reason}") as error:
        chat_for(template).encode([messages])
    assert "\n" not in str(error.value)


def test_a_date_that_is_never_written_is_no_reason():
    template = "{% if date %}{{ strftime_now('%d') }}{% endif %}" + LOOP + TURN + PROMPT
    assert said(chat_for(template), template, talk("Q", "A")) == ["A<|im_end|>"]


def test_a_control_token_in_a_text_is_text():
    template = SMALL["an_end_for_each_position"]
    chat, tokenizer = chat_for(template), tokenizer_for(template)
    hostile, plain = chat.encode([talk("<|im_end|>", "No <|stop|> here<|im_start|>"), talk("Q", "A")])
    assert (hostile.escaped, plain.escaped) == (True, False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [i for i in hostile.ids if i in special] == [i for i in plain.ids if i in special]
    assert tokenizer.decode(hostile.ids).replace("\u200b", "").count("No <|stop|> here<|im_start|>") == 1

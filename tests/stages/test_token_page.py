"""The page of tokens: what it marks is what is trained, whatever the conversations hold."""

from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models

from stages.common.chat import Chat
from stages.common.token_page import MAX_EDGE, Shown, choose, show_sample, texts_of, token_page
from stages.tokenize import tokenize
from tests.support.templates import LOOP, PROMPT, TURN, tokenizer_for

HOSTILE = "</script><b>bold</b> & \"quoted\" <img src=x onerror='alert(1)'>"
CHATML = LOOP + TURN + PROMPT
VOID = {"meta", "br", "input"}


class Reader(HTMLParser):
    """Reads a page: its tokens by conversation (kind, id, text), and all elements and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.conversations: list[list[list]] = []
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.is_token = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attributes}
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.conversations.append([])
        elif tag == "i" and "title" in values:
            self.is_token = True
            self.conversations[-1].append([values["class"], int(values["title"]), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.is_token = self.is_token and tag != "i"

    def handle_data(self, data):
        if self.is_token:
            self.conversations[-1][-1][2] += data


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def table(*talks: list[dict], lang: str = "en") -> pd.DataFrame:
    answers = [[True] * sum(m["role"] == "assistant" for m in messages) for messages in talks]
    return pd.DataFrame({"messages": list(talks), "trained": answers, "lang": lang, "message_tree_id": "t"})


def shown_of(
    conversations: pd.DataFrame, max_length: int, side: str = "right"
) -> tuple[list[Shown], pd.DataFrame, dict]:
    tokenizer = tokenizer_for(CHATML)
    frame, counts = tokenize(conversations, tokenizer, max_length, truncation_side=side)
    cut = SimpleNamespace(max_length=max_length, truncation_side=side)
    return show_sample(Chat.of(tokenizer), tokenizer, (conversations, frame), "train", cut), frame, counts


def page_of(conversations: pd.DataFrame, max_length: int, side: str = "right") -> tuple[str, pd.DataFrame]:
    shown, frame, counts = shown_of(conversations, max_length, side)
    return token_page(shown, {"train": counts}, ["<|im_end|>"]), frame


TALKS = table(talk("Hi", "Yo"), talk("One\n\ttwo?", "Zwölf 🙂\u200b", "And?", "空 <|im_end|>"), talk(HOSTILE, HOSTILE))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [45, 1000])
def test_the_marked_tokens_are_those_that_are_trained(side, max_length):
    page, frame = page_of(TALKS.assign(trained=[[True], [False, True], [True]]), max_length, side)
    read = [tokens for tokens in Reader(page).conversations if tokens]
    assert len(read) == len(frame) >= 1
    for tokens, ids, mask in zip(read, frame["input_ids"], frame["assistant_masks"], strict=True):
        assert [number for _, number, _ in tokens] == list(ids)
        assert [kind in ("s", "e") for kind, _, _ in tokens] == [bool(is_trained) for is_trained in mask]
        ends = [text for kind, _, text in tokens if kind == "e"]
        assert ends == ["<|im_end|>"] * sum(mask[i] and not any(mask[i + 1 : i + 2]) for i in range(len(mask)))
        assert all(text.startswith("<|im_") for kind, _, text in tokens if kind == "c")


def test_text_that_looks_like_html_is_text():
    page, _ = page_of(TALKS, 1000)
    plain = Reader(page_of(TALKS[:2], 1000)[0])
    hostile = Reader(page)
    assert not {"script", "img", "link", "iframe"} & set(hostile.elements)
    assert hostile.attributes == plain.attributes and "onerror" not in hostile.attributes
    said = "".join(text for _, _, text in hostile.conversations[2]).replace("·", " ")
    assert HOSTILE in said
    assert not hostile.open
    lost = Reader(page_of(table(talk("Hi", "Yo", HOSTILE, HOSTILE)), 30)[0])  # among the turns that are cut off
    assert not {"script", "img"} & set(lost.elements)


def test_it_is_the_same_twice_and_needs_nothing_from_elsewhere():
    page, _ = page_of(TALKS, 1000)
    assert page == page_of(TALKS, 1000)[0]
    assert "http:" not in page and "https:" not in page and "url(" not in page and "/tmp" not in page


def test_white_space_and_what_shows_nothing_are_shown():
    page, _ = page_of(TALKS, 1000)
    said = "".join(text for _, _, text in Reader(page).conversations[1])
    said = said.replace("‥", "")  # of a character that is several tokens
    assert "One⏎→two?" in said and "Zwölf·🙂U+200B" in said
    assert "<U+200B|im_end|>" in said  # as it is trained: a text that spells a control token is escaped


def test_the_texts_of_tokens_are_the_text_of_the_conversation():
    tokenizer = tokenizer_for(CHATML)
    ids = tokenizer.encode("Zwölf 🙂 空はなぜ\n\n  x<|im_end|>", add_special_tokens=False)
    assert "".join(text or "" for text in texts_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_decoder_that_changes_earlier_text_stops_nothing():
    vocabulary = {"▁a": 0, "▁b": 1, "<0xE7>": 2, "<0xA9>": 3, "<0xBA>": 4, "##": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # as Llama 2's
    texts = list(texts_of(SimpleNamespace(backend_tokenizer=tokenizer), [0, 1, 2, 3, 4, 0, 2, 1]))
    assert len(texts) == 8 and "".join(text or "" for text in texts[:6]) == "a b空 a"
    changing = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁a▁b", "x"), decoders.Replace("▁", " ")])
    tokenizer.decoder = changing
    assert len(list(texts_of(SimpleNamespace(backend_tokenizer=tokenizer), [0, 1, 0, 0, 1]))) == 5


def test_what_a_conversation_lost_is_said():
    long = talk(*(f"turn {i}" for i in range(6)))
    (cut,), _, counts = shown_of(table(long), 60)
    kept = 3 - counts["dropped"]["answers_cut_off"]
    assert 0 < kept < 3 and cut.answers_lost == 3 - kept and cut.tokens_lost > 0
    assert [text for _, text in cut.lost] == [f"turn {i}" for i in range(2 * kept, 6)]
    (cut,), _, counts = shown_of(table(long), 60, "left")
    assert [text for _, text in cut.lost] == [f"turn {i}" for i in range(2 * cut.answers_lost)]
    (gone,), _, counts = shown_of(table(talk("why? " * 50, "no")), 30)
    assert gone.why == "left out" and not gone.head and gone.answers_lost == counts["dropped"]["too_long"] == 1
    assert gone.tokens_lost > 30


def test_the_sample_has_an_example_of_each_kind():
    talks = [talk("a b c", "d"), talk("a", "b" * 50), talk("a", "b"), talk("a", "b", "c", "d"), talk("why? " * 99, "n")]
    conversations = pd.concat([table(*talks), table(talk("Warum?", "Darum."), lang="de")], ignore_index=True)
    frame, _ = tokenize(conversations, tokenizer_for(CHATML), 100)
    assert choose(conversations, frame) == {
        0: ["first", "language en"],
        1: ["longest"],
        2: ["shortest"],
        3: ["most turns"],
        4: ["left out"],
        5: ["language de"],
    }


def test_many_long_conversations_make_a_small_page():
    long = "\n".join(f"{'x' * 200} {i} {' ' * 40}\u200b" for i in range(8))
    many = pd.concat([table(talk(long, long, long, long), lang=f"l{i}") for i in range(10)], ignore_index=True)
    page, _ = page_of(many, 6000)
    assert len(page.encode()) < 1_000_000
    tokens = Reader(page).conversations[0]
    assert len(tokens) == 2 * MAX_EDGE and "more tokens, not shown here" in page

"""The page that shows what is trained: a sample of conversations, token by token, as HTML without scripts."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from stages.common.chat import Chat
from stages.common.chat.skeleton import Message
from stages.common.truncation import Cut, cut_conversation, lost_turns

PAGES = Path(__file__).parent.parent / "pages"

MAX_LANGUAGES = 6  # of each, the first conversation
MAX_EDGE = 250  # tokens shown at the beginning and at the end of a conversation
MAX_LOST = 6  # turns shown of those that a conversation lost
MAX_TEXT = 160  # characters shown of such a turn
MAX_PIECES = 24  # parts shown of a token

PROMPT, SUPERVISED, END, CONTROL = "p", "s", "e", "c"  # CSS classes of tokens
SPACE, TAB, BREAK = "·", "→", "⏎"
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp", "Co", "Cn"}  # Unicode categories of characters that show nothing


class Part(NamedTuple):
    """A part of a token: text as it is, or a sign for what cannot be seen."""

    text: str
    is_sign: bool


@dataclass(frozen=True)
class Token:
    """A token of the page."""

    id: int
    kind: str
    parts: list[Part]
    breaks: bool  # whether a line ends behind it


@dataclass(frozen=True)
class Shown:
    """A conversation of the page. `hidden` is how many tokens between `head` and `tail` are not shown."""

    title: str
    why: str
    lang: str
    length: int
    supervised: int
    head: list[Token]
    hidden: int
    tail: list[Token]
    answers_lost: int
    tokens_lost: int
    lost: list[tuple[str, str]]
    more_lost: int


def choose(conversations: pd.DataFrame, frame: pd.DataFrame) -> dict[Any, list[str]]:
    """The rows of `conversations` to show, each with what it is an example of; in the order of the table.

    `frame` is what tokenize made of them: the same index, without the conversations of which nothing is left.
    """
    chosen: dict[Any, list[str]] = {}

    def add(row: Any, why: str) -> None:
        chosen.setdefault(row, []).append(why)

    left_out = conversations.index.difference(frame.index, sort=False)
    if len(left_out):
        add(left_out[0], "left out")
    if len(frame):
        turns = conversations.loc[frame.index, "messages"].map(len)
        add(frame.index[0], "first")
        add(frame["length"].idxmax(), "longest")
        add(frame["length"].idxmin(), "shortest")
        if turns.max() > turns.min():
            add(turns.idxmax(), "most turns")
        for language in frame["lang"].value_counts(sort=True).index[:MAX_LANGUAGES]:
            add(frame.index[frame["lang"] == language][0], f"language {language}")
        cut = frame.index[frame["answers_cut_off"] > 0]
        for row, why in zip(cut[:2], ("cut", "cut, too"), strict=False):
            add(row, why)
    return {row: chosen[row] for row in conversations.index if row in chosen}


def show_sample(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, tables: tuple[pd.DataFrame, pd.DataFrame], split: str, cut: Any
) -> list[Shown]:
    """The sample of a split. `tables`: its conversations, and what tokenize made of them. `cut` has max_length and
    truncation_side."""
    conversations, frame = tables
    shown = []
    for row, why in choose(conversations, frame).items():
        talk = conversations.loc[row]
        messages = list(talk["messages"])
        (encoded,) = chat.encode([messages])
        left = cut_conversation(chat, (messages, talk["trained"]), encoded, cut.max_length, cut.truncation_side)
        lost = lost_turns(messages, left, cut.truncation_side)
        title = f"{split} {conversations.index.get_loc(row) + 1}"
        about = (title, ", ".join(why), str(talk["lang"]), max(0, encoded.spans[-1][1] - len(left.ids if left else [])))
        shown.append(_shown(tokenizer, about, left, lost))
    return shown


def _shown(
    tokenizer: PreTrainedTokenizerBase, about: tuple[str, str, str, int], left: Cut | None, lost: Sequence[Message]
) -> Shown:
    title, why, lang, tokens_lost = about
    tokens = list(tokens_of(tokenizer, left.ids, left.mask.tolist())) if left else []
    hidden = max(0, len(tokens) - 2 * MAX_EDGE)
    head = tokens[:MAX_EDGE] if hidden else tokens
    return Shown(
        title,
        why,
        lang,
        len(tokens),
        int(left.mask.sum()) if left else 0,
        head,
        hidden,
        tokens[-MAX_EDGE:] if hidden else [],
        sum(message["role"] == "assistant" for message in lost),
        tokens_lost,
        [(str(message["role"]), shortened(message["content"])) for message in lost[:MAX_LOST]],
        max(0, len(lost) - MAX_LOST),
    )


def shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def tokens_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[int]) -> Iterator[Token]:
    """The tokens of a conversation, as they are shown."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number, (token, text) in enumerate(zip(ids, texts_of(tokenizer, ids), strict=True)):
        if mask[number]:
            # An end token is special, and the last of its answer.
            kind = END if token in special and not any(mask[number + 1 : number + 2]) else SUPERVISED
        else:
            kind = CONTROL if token in special else PROMPT
        parts = [Part("‥", True)] if text is None else list(parts_of(text))
        if len(parts) > MAX_PIECES:
            parts = [*parts[:MAX_PIECES], Part("…", True)]
        yield Token(int(token), kind, parts, text is not None and text.endswith("\n"))


def texts_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str | None]:
    """The text of each token; None of one that ends inside a character, which the next one completes."""
    stream = DecodeStream(skip_special_tokens=False)
    backend = tokenizer.backend_tokenizer
    for token in ids:
        try:
            yield stream.step(backend, int(token))
        except Exception:  # a decoder that changes earlier text as tokens follow: the token alone
            stream = DecodeStream(skip_special_tokens=False)
            yield backend.decode([int(token)], skip_special_tokens=False)


def parts_of(text: str) -> Iterator[Part]:
    """A token's text with a sign for each character that cannot be seen; a run of letters is one part."""
    run = ""
    for character in text:
        sign = {" ": SPACE, "\t": TAB, "\n": BREAK}.get(character)
        if sign is None and unicodedata.category(character) in INVISIBLE:
            sign = f"U+{ord(character):04X}"
        if sign is None:
            run += character
            continue
        if run:
            yield Part(run, False)
            run = ""
        yield Part(sign, True)
    if run:
        yield Part(run, False)


def token_page(sample: Sequence[Shown], counts: dict[str, Any], ends: Sequence[str]) -> str:
    """The HTML of the page. `counts` are those of each split, as in reports/tokens.json."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("tokens.html").render(sample=sample, counts=counts, ends=ends)

"""A tokenizer of the tokenizers library, as chats need it: control tokens, the tokens of each answer, what they say."""

import re
from functools import cached_property
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer, decoders

from stages.common.chat.skeleton import ChatError, Span, difference, shown

INVISIBLE = "\u200b"  # put inside a control token that a text spells
NO_TEXT = b"\xff"  # is in no UTF-8


class Found(NamedTuple):
    """An answer among tokens."""

    start: int
    stop: int  # behind its end token
    text: str  # what the tokens up to its end token say
    end: int  # the id of that


class Tokens:
    """Texts to token ids, with the tokens of each answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())  # of our own: others may set truncation on theirs
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # It adds special tokens, which a template writes itself, and may trim white space from offsets.
        self._tokenizer.post_processor = None
        added = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._ids = {token.content: i for i, token in added.items()}
        self._special = frozenset(added)
        self._controls = sorted(self._ids, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, self._controls)) or "(?!)")  # matches a special token

    @cached_property
    def _bytes(self) -> list[bytes]:
        return bytes_of_tokens(self._tokenizer)

    def escape(self, text: str) -> str:
        """`text` with an invisible space inside each control token; otherwise it could end or begin a turn."""
        if self.control.search(text):
            for token in self._controls:
                text = text.replace(token, f"{token[:1]}{INVISIBLE}{token[1:]}")
        return text

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, texts: list[str]) -> list[Encoding]:
        return list(self._tokenizer.encode_batch(texts, add_special_tokens=False))

    def find(self, encoding: Encoding, ids: list[int], text: str, spans: list[Span]) -> list[Found]:
        """The tokens of each answer in a text of these `ids`. Raises ChatError where one belongs to its prompt, too."""
        return [self._find(encoding, ids, text, span) for span in spans]

    def _find(self, encoding: Encoding, ids: list[int], text: str, span: Span) -> Found:
        end = encoding.char_to_token(span.stop)
        if end is None or ids[end] != self._ids[span.end]:
            raise ChatError(
                f"its end token {span.end} is not one token in {shown(text[span.start :])}. Choose another."
            )
        at = span.start
        while (first := encoding.char_to_token(at)) is None:
            at += 1
        begin = _begin(encoding, first)
        if begin < span.start:
            if ids[first] in self._special:  # some take the white space behind them
                first += 1
                begin = _begin(encoding, first)
            elif text[begin : span.start].strip():
                raise ChatError(
                    f"the token {shown(text[begin : span.start + 1])} belongs both to the prompt and to the answer "
                    f"{shown(span.content)}. Choose a template with white space between the two."
                )
        return Found(first, end + 1, text[begin : _begin(encoding, end)], self._ids[span.end])

    def check(self, ids: list[int], answers: list[Found], spans: list[Span]) -> None:
        """Raise ChatError unless the tokens of each answer are those of its text, and then its end token."""
        for (start, stop, text, end), span in zip(answers, spans, strict=True):
            if not (self._says(ids[start : stop - 1], text) and ids[stop - 1] == end):
                said = self._tokenizer.decode(ids[start:stop], skip_special_tokens=False)
                found = difference(text + span.end, said)
                raise ChatError(f"an answer's tokens say {found}. Choose another template.")
            if text.strip() != span.content.strip():
                found = difference(span.content, text)
                raise ChatError(f"its tokens do not begin and end where an answer does: {found}. Choose another.")

    def _says(self, ids: list[int], text: str) -> bool:
        if self._bytes and b"".join(map(self._bytes.__getitem__, ids)) == text.encode():
            return True
        alone = self.ids(text)
        said, meant = (self._tokenizer.decode(x, skip_special_tokens=False).strip() for x in (ids, alone))
        if meant == text.strip() and self._bytes:
            return False
        # Other decoders drop the first space. Some tokenizers compose characters, or have no token for one.
        return said == meant and self._special.isdisjoint(set(ids) - set(alone))


def _begin(encoding: Encoding, token: int) -> int:
    """The character at which a token begins."""
    place = encoding.token_to_chars(token)
    assert place is not None
    return place[0]


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token of a byte-level tokenizer, by which it decodes ten times faster; [] for another.

    A special token has bytes that no text has.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return []
    # Its alphabet: a byte that can be printed is its own character, the others follow from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {256 + i: byte for i, byte in enumerate(others)}
    table = [NO_TEXT] * (max(tokenizer.get_vocab().values()) + 1)
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        table[i] = token.translate(byte_of).encode("latin-1", "replace")
    for i, added in tokenizer.get_added_tokens_decoder().items():
        table[i] = NO_TEXT if added.special else added.content.encode()
    return table

"""A tokenizer of the tokenizers library, as chats need it: control tokens, the tokens of each answer, what they say."""

import re

from tokenizers import Encoding, Tokenizer, decoders

from stages.common.chat.skeleton import ChatError, Span, difference, shown

INVISIBLE = "\u200b"  # put inside a control token that a text spells
NO_TEXT = b"\xff"  # is in no UTF-8


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
        self._bytes = bytes_of_tokens(self._tokenizer)

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

    def find(self, encoding: Encoding, text: str, spans: list[Span]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and each answer's first token and the one behind its end token.

        Raises ChatError where a token belongs to an answer and to what is before it.
        """
        ids: list[int] = encoding.ids
        tokens = []
        for span in spans:
            end = encoding.char_to_token(span.stop)
            if end is None or ids[end] != self._ids[span.end]:
                raise ChatError(f"its end token {span.end} is not one token in {shown(text[span.start :])}.")
            at = span.start
            while (first := encoding.char_to_token(at)) is None:
                at += 1
            begin = (encoding.token_to_chars(first) or (at, at))[0]
            if begin < span.start:
                if ids[first] in self._special:  # some take the white space behind them
                    first += 1
                elif text[begin : span.start].strip():
                    raise ChatError(
                        f"the token {shown(text[begin : span.start + 1])} belongs both to the prompt and to the answer "
                        f"{shown(span.content)}. Choose a template with white space between the two."
                    )
            tokens.append((first, end + 1))
        return ids, tokens

    def check(self, answers: list[list[int]], contents: list[str]) -> tuple[int, str] | None:
        """The first answer (without its end token) that does not say its content, and how; None when all do."""
        for i, (ids, content) in enumerate(zip(answers, contents, strict=True)):
            expected = content.strip()
            if self._bytes:
                said = b"".join(map(self._bytes.__getitem__, ids))
                if said == content.encode() or said.decode("utf-8", "surrogateescape").strip() == expected:
                    continue
            text = self._tokenizer.decode(ids, skip_special_tokens=False).strip()
            # Some tokenizers compose characters, or have no token for one.
            if (
                text != expected
                and text != self._tokenizer.decode(self.ids(content), skip_special_tokens=False).strip()
            ):
                return i, f"an answer's tokens say {difference(content, text)}."
            if not self._special.isdisjoint(ids):
                return i, f"an answer holds a control token: {shown(text)}."
        return None


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token of a byte-level tokenizer, by which it decodes ten times faster; [] for another.

    A special token has bytes that no text has.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return []
    # Its alphabet: a byte that can be printed is its own character, the others follow from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    table = [NO_TEXT] * (max(tokenizer.get_vocab().values()) + 1)
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        if all(character in byte_of for character in token):
            table[i] = bytes(byte_of[character] for character in token)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        table[i] = NO_TEXT if added.special else added.content.encode()
    return table

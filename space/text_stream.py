"""Tokens to text, piece by piece, as they are generated."""

from tokenizers import Tokenizer

# Tokens of byte-level vocabularies may end inside a character; decoding then ends with this.
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of an answer as it grows: only whole characters, without white space at its beginning and its end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding a token may depend on those before it: ids[start:done] are decoded again each time, as a context.
        self._start = self._done = 0
        self._begun = False
        self._space = ""

    def add(self, token: int) -> str:
        """The text that this token completes; often a word, sometimes nothing."""
        self._ids.append(token)
        return self._grow(last=False)

    def finish(self) -> str:
        """What is left when no token follows: a character that stays incomplete is dropped."""
        return self._grow(last=True)

    def _grow(self, last: bool) -> str:
        context = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        if text.endswith(INCOMPLETE):
            if not last:
                return ""
            text = text.rstrip(INCOMPLETE)
        self._start, self._done = self._done, len(self._ids)
        return self._without_space_around(text[len(context) :])

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _without_space_around(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        whole = self._space + text
        kept = whole.rstrip()
        self._space = whole[len(kept) :]
        return kept

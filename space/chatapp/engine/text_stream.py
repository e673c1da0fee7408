"""Turn generated tokens into text, piece by piece."""

from tokenizers import Tokenizer

# A token of a byte-level vocabulary may end inside a character. The decoded text then ends with this one.
INCOMPLETE = "\ufffd"


class TextStream:
    """The growing text of an answer: complete characters only.

    An answer has no white space at its beginning and end. A text that goes on `after` a prompt's last token keeps it.
    """

    def __init__(self, tokenizer: Tokenizer, after: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._trim = after is None
        self._ids: list[int] = [] if after is None else [after]
        # A token's text may depend on the tokens before it, so ids[start:done] are decoded again as a context.
        self._start, self._done = 0, len(self._ids)
        self._begun = False
        self._space = ""

    def add(self, token: int) -> str:
        """The text that this token completes: often a word, sometimes nothing."""
        self._ids.append(token)
        return self._new_text(last=False)

    def finish(self) -> str:
        """The rest of the text when no token follows. An incomplete last character is dropped."""
        return self._new_text(last=True)

    def _new_text(self, last: bool) -> str:
        context = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        if text.endswith(INCOMPLETE):
            if not last:
                return ""
            text = text.rstrip(INCOMPLETE)
        self._start, self._done = self._done, len(self._ids)
        new = text[len(context) :]
        return self._without_space_around(new) if self._trim else new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _without_space_around(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return kept

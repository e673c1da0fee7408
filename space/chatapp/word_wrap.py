"""Break lines between words in a text that arrives piece by piece, for a terminal."""

import re
import unicodedata

# Chinese, Japanese and Korean characters: lines may break between any two of them.
WIDE = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
# A word with the spaces before it, the end of a line, or spaces at the end.
PARTS = re.compile(rf"[^\S\n]*(?:[{WIDE}]|[^\s{WIDE}]+)|\n|[^\S\n]+")


def columns(text: str) -> int:
    """The columns of a terminal that the text takes: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


class WordWrap:
    """Wraps at `width` columns. The terminal itself breaks a word that is longer than a line."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._last = ""  # the newest part: its rest may come with the next piece

    def add(self, piece: str) -> str:
        """What can be printed after this piece."""
        parts = PARTS.findall(self._last + piece)
        self._last = parts.pop() if parts and parts[-1] != "\n" else ""
        return "".join(map(self._placed, parts))

    def finish(self) -> str:
        """What is left at the end of the text."""
        last, self._last = self._last, ""
        return self._placed(last)

    def _placed(self, part: str) -> str:
        """The part, on a new line where it does not fit the current one."""
        if part == "\n":
            self._column = 0
            return part
        if self._column and self._column + columns(part) > self._width:
            part = part.lstrip()
            self._column = columns(part) % self._width
            return f"\n{part}"
        self._column += columns(part)
        return part

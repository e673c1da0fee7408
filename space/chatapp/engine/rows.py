"""Which conversation each row of the decoder has read: a follow-up question then reads only the new messages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from chatapp.engine.decoder import Decoder


@dataclass(eq=False)
class Row:
    """A conversation in memory. `at` is its row in the decoder, and may change."""

    at: int
    ids: list[int] = field(default_factory=list)  # what it has read
    prompt: int = 0  # how many of these were the last prompt
    reserved: int = 0  # tokens that it may have when its answer ends; 0 when it has no answer to write
    used: int = 0  # when it was taken, as a count

    def in_common(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` were read already. The last one never counts, because reading it gives logits."""
        longest = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(longest) if self.ids[i] != ids[i]), longest)


class Rows:
    """The rows of a decoder. Rows stay in memory after their answer, as long as nobody else needs the room."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._rows = [Row(at) for at in range(len(decoder.lengths))]
        self._count = count(1)

    def take(self, ids: Sequence[int], more: int) -> Row | None:
        """A row for a conversation of `ids` and `more` tokens after it; it may have read a part of `ids` already.

        None when others that write their answers leave no room. Give it back by `free`.
        """
        needed = len(ids) + more
        idle = [row for row in self._rows if not row.reserved]
        reserved = sum(row.reserved for row in self._rows)
        if not idle or (reserved and reserved + needed > self._decoder.token_room):
            return None
        common, best = max(((row.in_common(ids), row) for row in self._rows), key=lambda pair: (pair[0], pair[1].used))
        # A row that has read something else belongs to another conversation: copy what is shared.
        if best.reserved or common < best.prompt - 1:
            source, best = best, min(idle, key=lambda row: (len(row.ids) > 0, row.used, row.at))
            self._copy(source, best, common)
        self._make_room(reserved + needed, best)
        del best.ids[common:]
        self._decoder.cut(best.at, common)
        best.prompt, best.reserved, best.used = len(ids), needed, next(self._count)
        return best

    def read(self, row: Row, ids: Sequence[int]) -> np.ndarray:
        """Read `ids` after what the row has read. Logits of the next token, of shape (vocabulary,)."""
        logits = self._decoder.read(row.at, ids)[-1]
        row.ids += ids
        return logits

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Read one token in each of the first rows. Logits of the next ones, of shape (rows, vocabulary)."""
        logits = self._decoder.step(tokens)
        for row, token in zip(self._rows, tokens, strict=False):
            row.ids.append(token)
        return logits

    def place(self, row: Row, at: int) -> None:
        """Put `row` at this place of the decoder; the row that was there goes to its old place."""
        other = self._rows[at]
        if row is not other:
            self._decoder.swap(row.at, at)
            self._rows[row.at], self._rows[at] = other, row
            row.at, other.at = at, row.at

    def free(self, row: Row) -> None:
        """The row's answer has ended."""
        row.reserved = 0

    def drop(self, row: Row) -> None:
        """The row's answer has failed: forget what it has read."""
        self._forget(row)
        row.reserved = 0

    def clear(self) -> None:
        """Forget all."""
        for row in self._rows:
            self.drop(row)

    def _copy(self, source: Row, target: Row, length: int) -> None:
        if source is not target:
            self._decoder.clear(target.at)
            self._decoder.copy(source.at, target.at, length)
            target.ids = source.ids[:length]

    def _forget(self, row: Row) -> None:
        self._decoder.clear(row.at)
        row.ids, row.prompt, row.used = [], 0, 0

    def _make_room(self, reserved: int, taken: Row) -> None:
        """Forget the conversations that were not used for the longest time, until `reserved` tokens have room."""
        kept = sorted((row for row in self._rows if not row.reserved and row is not taken), key=lambda row: row.used)
        held = sum(len(row.ids) for row in kept)
        for row in kept:
            if reserved + held <= self._decoder.token_room:
                return
            held -= len(row.ids)
            self._forget(row)

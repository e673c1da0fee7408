"""What is left of the data after each step, and the funnel: what each step dropped."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

Thread = tuple[str, ...]  # the message ids from a root to an answer


def is_among(column: pd.Series, values: Iterable[str]) -> pd.Series:
    """Which entries of `column` are among `values`. On Arrow's strings, `Series.isin` takes seconds for 100,000 values:
    it converts each by itself."""
    known = set(values)
    return pd.Series([value in known for value in column.tolist()], index=column.index, dtype=bool)


def count(messages: pd.DataFrame) -> dict[str, Any]:
    """Messages, trees and characters of `messages`: in all, and by_language."""

    def figures(part: pd.DataFrame) -> dict[str, int]:
        return {
            "messages": len(part),
            "trees": int(part["message_tree_id"].nunique()),
            "characters": int(part["text"].str.len().sum()),
        }

    return {**figures(messages), "by_language": {k: figures(v) for k, v in messages.groupby("lang", sort=True)}}


@dataclass(frozen=True)
class Funnel:
    """What was read, and what each step dropped, by its reason: messages, trees and characters add up.

    A tree counts as dropped by the step that drops its last message. A step also has the conversations that it dropped,
    and the messages and trees that it left.
    """

    read: dict[str, Any]
    dropped: dict[str, Any] = field(default_factory=dict)

    def drop(self, gone: pd.DataFrame, kept: pd.DataFrame, reason: str, conversations: int) -> "Funnel":
        """The funnel with one more step, which dropped the messages `gone` and kept `kept`."""
        step = count(gone)
        step["trees"] = int((~is_among(gone["message_tree_id"].drop_duplicates(), kept["message_tree_id"])).sum())
        step["conversations"] = conversations
        step["messages_left"] = len(kept)
        step["trees_left"] = int(kept["message_tree_id"].nunique())
        return replace(self, dropped={**self.dropped, reason: step})


@dataclass(frozen=True)
class Selection:
    """The messages that are left (columns: see `read_messages`), the threads found in them, and the funnel.

    Each step returns a new selection, with one more entry in its funnel.
    """

    messages: pd.DataFrame
    funnel: Funnel
    threads: Sequence[Thread] = ()

    @classmethod
    def of(cls, messages: pd.DataFrame) -> "Selection":
        """All of `messages`."""
        # A bad row may have no text and no tree; it counts as a message in a tree without a name.
        return cls(messages, Funnel(count(messages.fillna({"text": "", "message_tree_id": ""}))))

    def keep(self, mask: pd.Series, reason: str) -> "Selection":
        """Drop the messages where `mask` is False. For the time before threads are found."""
        return self._keep(mask, reason, 0)

    def with_threads(self, threads: Sequence[Thread], reason: str) -> "Selection":
        """Set the threads, and drop the messages that are in none of them."""
        return replace(self._keep(self._in(threads), reason, 0), threads=threads)

    def keep_threads(self, mask: Sequence[bool], reason: str) -> "Selection":
        """Drop the threads where `mask` is False, and the messages that are in no other thread."""
        threads = [ids for ids, stays in zip(self.threads, mask, strict=True) if stays]
        return replace(self._keep(self._in(threads), reason, len(self.threads) - len(threads)), threads=threads)

    def values(self, column: str) -> dict[str, Any]:
        """A column's values by message_id."""
        return dict(zip(self.messages["message_id"], self.messages[column], strict=True))

    def _in(self, threads: Sequence[Thread]) -> pd.Series:
        return is_among(self.messages["message_id"], (message_id for ids in threads for message_id in ids))

    def _keep(self, mask: pd.Series, reason: str, conversations: int) -> "Selection":
        kept = self.messages[mask]
        return replace(self, messages=kept, funnel=self.funnel.drop(self.messages[~mask], kept, reason, conversations))

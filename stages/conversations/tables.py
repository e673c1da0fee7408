"""Chosen threads -> the tables and counts that prepare writes."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from stages.conversations.selection import Selection, Thread, count, is_among
from stages.conversations.threads import trained_answers


def conversation_table(selection: Selection, threads: Sequence[Thread], system_prompt: str) -> pd.DataFrame:
    """A row for each of `threads`; one that a weight repeats has several.

    Columns: message_tree_id, message_ids, dataset (0, 1, …), lang (of the first message), messages (role and content,
    as TRL reads them; first the conversation's own system message or `system_prompt`, unless that is empty; later
    system messages in their places), trained (a flag for each answer; see `trained_answers`).
    """
    text, role, own_system = (selection.values(name) for name in ("text", "role", "system"))
    tree, lang, dataset = (selection.values(name) for name in ("message_tree_id", "lang", "dataset"))

    def messages_of(ids: Thread) -> list[dict[str, str]]:
        messages = []
        for i in ids:
            own = own_system[i]
            system = own if isinstance(own, str) else system_prompt if i == ids[0] else ""
            if system:
                messages.append({"role": "system", "content": system})
            messages.append({"role": role[i], "content": text[i].strip()})
        return messages

    distinct = list(dict.fromkeys(threads))
    flags = dict(zip(distinct, trained_answers(distinct, selection.values("trained")), strict=True))
    return pd.DataFrame(
        {
            "message_tree_id": [tree[ids[0]] for ids in threads],
            "message_ids": [list(ids) for ids in threads],
            "dataset": [dataset[ids[0]] for ids in threads],
            "lang": [lang[ids[0]] for ids in threads],
            "messages": [messages_of(ids) for ids in threads],
            "trained": [flags[ids] for ids in threads],
        }
    )


def count_kept(messages: pd.DataFrame, conversations: pd.DataFrame) -> dict[str, Any]:
    """Messages (each once), trees, characters and conversations of a split: in all, by language, and by_dataset where
    `messages`, those of all splits, come from several data sets."""
    used = {message_id for ids in conversations["message_ids"] for message_id in ids}
    counts = {**count(messages[is_among(messages["message_id"], used)]), "conversations": len(conversations)}
    if messages["dataset"].nunique() > 1:
        of_each = conversations["dataset"].value_counts()
        counts["by_dataset"] = {str(number + 1): int(of_each[number]) for number in sorted(of_each.index)}
    for language, number in conversations["lang"].value_counts().items():
        counts["by_language"][language]["conversations"] = int(number)
    return counts

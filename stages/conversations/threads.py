"""Trees -> threads: paths from a question to an answer, in which user and assistant alternate."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from stages.conversations.selection import Thread, is_among


def reachable(messages: pd.DataFrame) -> pd.Series:
    """Which messages are linked, parent by parent, to a root that is among `messages`."""
    children: dict[str, list[str]] = {}
    for message_id, parent_id in zip(messages["message_id"], messages["parent_id"], strict=True):
        if isinstance(parent_id, str):
            children.setdefault(parent_id, []).append(message_id)
    found: set[str] = set()
    frontier = list(messages.loc[messages["parent_id"].isna(), "message_id"])
    while frontier:
        found.update(frontier)
        frontier = [child for parent in frontier for child in children.get(parent, ())]
    return is_among(messages["message_id"], found)


def right_roles(messages: pd.DataFrame) -> pd.Series:
    """Which messages can stand in a conversation: roots of the user, and replies to the other role."""
    role = messages.set_index("message_id")["role"]
    parent_role = messages["parent_id"].map(role)
    return (parent_role.isna() & (messages["role"] == "user")) | (
        parent_role.notna() & (parent_role != messages["role"])
    )


def answered(messages: pd.DataFrame) -> pd.Series:
    """Which messages are answers, or questions that have an answer."""
    return (messages["role"] != "user") | is_among(messages["message_id"], messages["parent_id"].dropna())


def find_threads(messages: pd.DataFrame, which: str) -> list[Thread]:
    """The threads of all trees, in the order of their roots; each ends on an answer.

    `messages` alternate (see `right_roles`). `best` follows the best-ranked reply at each message (a missing rank
    counts as last, ties keep their order); `all` gives every path to a leaf.
    """
    role = dict(zip(messages["message_id"], messages["role"], strict=True))
    replies: dict[str, list[str]] = {}
    ranked = messages.sort_values("rank", kind="stable", na_position="last")
    for message_id, parent_id in zip(ranked["message_id"], ranked["parent_id"], strict=True):
        if isinstance(parent_id, str):
            replies.setdefault(parent_id, []).append(message_id)
    threads: dict[Thread, None] = {}  # a set that keeps its order
    for root in messages.loc[messages["parent_id"].isna(), "message_id"]:
        seen: set[str] = set()
        for path in _paths(root, replies, only_best=which == "best"):
            ids = path if role[path[-1]] == "assistant" else path[:-1]
            if ids and ids[-1] not in seen:  # otherwise a lone question, or the beginning of an earlier thread
                threads[tuple(ids)] = None
                seen.update(ids)
    return list(threads)


def _paths(root: str, replies: dict[str, list[str]], only_best: bool) -> Iterator[list[str]]:
    """Every path from `root` to a leaf, best-ranked replies first; with `only_best`, the first of them."""
    stack = [[root]]
    while stack:
        path = stack.pop()
        following = replies.get(path[-1], [])
        if not following:
            yield path
            if only_best:
                return
        stack.extend([*path, reply] for reply in reversed(following))


def cut_threads(threads: Sequence[Thread], max_turns: int | None) -> Sequence[Thread]:
    """The first `max_turns` question-answer turns of each thread (None: all); threads that become equal, once."""
    return threads if max_turns is None else list(dict.fromkeys(ids[: 2 * max_turns] for ids in threads))


def trained_answers(threads: Sequence[Thread], trained: Mapping[str, bool]) -> list[list[bool]]:
    """For each answer of each thread, whether it is trained on there: only in the first thread that holds it, and only
    where `trained` (by message id) lets it be."""
    seen: set[str] = set()
    flags = []
    for ids in threads:
        flags.append([i not in seen and bool(trained[i]) for i in ids[1::2]])
        seen.update(ids)
    return flags

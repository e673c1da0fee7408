"""What drops messages and threads: tables of (reason, condition), in the order in which they apply.

A condition returns a mask of what stays, or None where its parameter turns it off. What is unknown of a message passes.
To add a filter: its line here, its field in PrepareParams (stages/common/schema.py), its test.
"""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from stages.common.schema import PrepareParams
from stages.conversations.duplicates import dissimilar, first_copies, new_questions
from stages.conversations.messages import UNKNOWN
from stages.conversations.selection import Selection
from stages.conversations.threads import answered, reachable, right_roles
from stages.conversations.turns import GREETING, LATE_SYSTEM, SYSTEM_AT_END, UNSUPPORTED

Filter = tuple[str, Callable[[pd.DataFrame, PrepareParams], pd.Series | None]]
ThreadFilter = tuple[str, Callable[[Selection, PrepareParams], Sequence[bool] | None]]
LEAK = "question_is_held_out"


def not_left_out(messages: pd.DataFrame, reason: str) -> pd.Series | None:
    """Which messages are not left out for this reason; None where none is, as in message trees."""
    left_out = messages["left_out"] == reason
    return ~left_out if left_out.any() else None


# Rows that are messages of a tree.
VALID: tuple[Filter, ...] = (
    (UNSUPPORTED, lambda messages, params: not_left_out(messages, UNSUPPORTED)),
    (LATE_SYSTEM, lambda messages, params: not_left_out(messages, LATE_SYSTEM)),
    (GREETING, lambda messages, params: not_left_out(messages, GREETING)),
    (SYSTEM_AT_END, lambda messages, params: not_left_out(messages, SYSTEM_AT_END)),
    ("bad_row", lambda messages, params: messages["bad"].isna()),
    ("empty", lambda messages, params: messages["text"].str.strip() != ""),
    ("duplicate_id", lambda messages, params: ~messages["message_id"].duplicated()),
    ("orphan", lambda messages, params: reachable(messages)),
)

# Messages that the parameters choose.
FILTERS: tuple[Filter, ...] = (
    (
        "tree_state",
        lambda messages, params: (
            messages["tree_state"].isna() | messages["tree_state"].isin(params.tree_states)
            if params.tree_states
            else None
        ),
    ),
    ("deleted", lambda messages, params: ~messages["deleted"].astype(bool)),
    (
        "rejected_in_review",
        lambda messages, params: messages["review_result"].ne(False) if params.require_review else None,
    ),
    ("synthetic", lambda messages, params: None if params.allow_synthetic else ~messages["synthetic"].astype(bool)),
    (
        "language",
        lambda messages, params: messages["lang"].isin([*params.languages, UNKNOWN]) if params.languages else None,
    ),
    (
        "quality",
        lambda messages, params: (
            None
            if params.min_quality is None
            else (messages["role"] == "user") | ~(messages["quality"] < params.min_quality).fillna(False)
        ),
    ),
    (
        "toxicity",
        lambda messages, params: (
            None if params.max_toxicity is None else ~(messages["toxicity"] > params.max_toxicity).fillna(False)
        ),
    ),
    ("below_a_dropped_message", lambda messages, params: reachable(messages)),
)

# Messages that can stand in a conversation.
ALTERNATING: tuple[Filter, ...] = (
    ("wrong_role", lambda messages, params: right_roles(messages)),
    ("below_a_wrong_role", lambda messages, params: reachable(messages)),
    ("unanswered_question", lambda messages, params: answered(messages)),
)


def has_trained_answer(selection: Selection, params: PrepareParams) -> list[bool] | None:
    """Which threads hold an answer that the data let be trained on; None where they all may be."""
    if selection.messages["trained"].all():
        return None
    trained = selection.values("trained")
    return [any(trained[i] for i in ids[1::2]) for ids in selection.threads]


# Threads that become conversations.
THREAD_FILTERS: tuple[ThreadFilter, ...] = (
    ("below_min_turns", lambda selection, params: [len(ids) >= 2 * params.min_turns for ids in selection.threads]),
    ("not_to_be_trained", has_trained_answer),
)

# Threads that repeat others, once it is settled which are held out.
REPETITIONS: tuple[ThreadFilter, ...] = (
    (LEAK, new_questions),  # first, so that its number is that of the leak, copies included
    ("duplicate_conversation", first_copies),
    ("near_duplicate", dissimilar),
)


def keep_messages(selection: Selection, filters: Iterable[Filter], params: PrepareParams) -> Selection:
    """What the filters leave of a selection's messages."""
    for reason, condition in filters:
        mask = condition(selection.messages, params)
        if mask is not None:
            selection = selection.keep(mask, reason)
    return selection


def keep_threads(selection: Selection, filters: Iterable[ThreadFilter], params: PrepareParams) -> Selection:
    """What the filters leave of a selection's threads."""
    for reason, condition in filters:
        mask = condition(selection, params)
        if mask is not None:
            selection = selection.keep_threads(mask, reason)
    return selection

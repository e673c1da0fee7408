"""What drops messages and threads: tables of (reason, parameter, condition), in the order in which they apply.

The parameter is the one that governs the step; None where none does. A condition returns a mask of what stays, or None
where its parameter turns it off. What is unknown of a message passes.
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

Filter = tuple[str, str | None, Callable[[pd.DataFrame, PrepareParams], pd.Series | None]]
ThreadFilter = tuple[str, str | None, Callable[[Selection, PrepareParams], Sequence[bool] | None]]
LEAK = "question_is_held_out"


def not_left_out(messages: pd.DataFrame, reason: str) -> pd.Series | None:
    """Which messages are not left out for this reason; None where none is, as in message trees."""
    left_out = messages["left_out"] == reason
    return ~left_out if left_out.any() else None


# Rows that are messages of a tree.
VALID: tuple[Filter, ...] = (
    (UNSUPPORTED, "unsupported_rows", lambda messages, params: not_left_out(messages, UNSUPPORTED)),
    (LATE_SYSTEM, None, lambda messages, params: not_left_out(messages, LATE_SYSTEM)),
    (GREETING, None, lambda messages, params: not_left_out(messages, GREETING)),
    (SYSTEM_AT_END, None, lambda messages, params: not_left_out(messages, SYSTEM_AT_END)),
    ("bad_row", "max_bad_rows", lambda messages, params: messages["bad"].isna()),
    ("empty", None, lambda messages, params: messages["text"].str.strip() != ""),
    ("duplicate_id", None, lambda messages, params: ~messages["message_id"].duplicated()),
    ("orphan", None, lambda messages, params: reachable(messages)),
)

# Messages that the parameters choose.
FILTERS: tuple[Filter, ...] = (
    (
        "tree_state",
        "tree_states",
        lambda messages, params: (
            messages["tree_state"].isna() | messages["tree_state"].isin(params.tree_states)
            if params.tree_states
            else None
        ),
    ),
    ("deleted", None, lambda messages, params: ~messages["deleted"].astype(bool)),
    (
        "rejected_in_review",
        "require_review",
        lambda messages, params: messages["review_result"].ne(False) if params.require_review else None,
    ),
    (
        "synthetic",
        "allow_synthetic",
        lambda messages, params: None if params.allow_synthetic else ~messages["synthetic"].astype(bool),
    ),
    (
        "language",
        "languages",
        lambda messages, params: messages["lang"].isin([*params.languages, UNKNOWN]) if params.languages else None,
    ),
    (
        "quality",
        "min_quality",
        lambda messages, params: (
            None
            if params.min_quality is None
            else (messages["role"] == "user") | ~(messages["quality"] < params.min_quality).fillna(False)
        ),
    ),
    (
        "toxicity",
        "max_toxicity",
        lambda messages, params: (
            None if params.max_toxicity is None else ~(messages["toxicity"] > params.max_toxicity).fillna(False)
        ),
    ),
    ("below_a_dropped_message", None, lambda messages, params: reachable(messages)),
)

# Messages that can stand in a conversation.
ALTERNATING: tuple[Filter, ...] = (
    ("wrong_role", None, lambda messages, params: right_roles(messages)),
    ("below_a_wrong_role", None, lambda messages, params: reachable(messages)),
    ("unanswered_question", None, lambda messages, params: answered(messages)),
)


def has_trained_answer(selection: Selection, params: PrepareParams) -> list[bool] | None:
    """Which threads hold an answer that the data let be trained on; None where they all may be."""
    if selection.messages["trained"].all():
        return None
    trained = selection.values("trained")
    return [any(trained[i] for i in ids[1::2]) for ids in selection.threads]


# Threads that become conversations.
THREAD_FILTERS: tuple[ThreadFilter, ...] = (
    (
        "below_min_turns",
        "min_turns",
        lambda selection, params: [len(ids) >= 2 * params.min_turns for ids in selection.threads],
    ),
    ("not_to_be_trained", None, has_trained_answer),
)

# Threads that repeat others, once it is settled which are held out.
REPETITIONS: tuple[ThreadFilter, ...] = (
    (LEAK, None, new_questions),  # first, so that its number is that of the leak, copies included
    ("duplicate_conversation", None, first_copies),
    ("near_duplicate", "max_similarity", dissimilar),
)


def keep_messages(selection: Selection, filters: Iterable[Filter], params: PrepareParams) -> Selection:
    """What the filters leave of a selection's messages."""
    for reason, _, condition in filters:
        mask = condition(selection.messages, params)
        if mask is not None:
            selection = selection.keep(mask, reason)
    return selection


def keep_threads(selection: Selection, filters: Iterable[ThreadFilter], params: PrepareParams) -> Selection:
    """What the filters leave of a selection's threads."""
    for reason, _, condition in filters:
        mask = condition(selection, params)
        if mask is not None:
            selection = selection.keep_threads(mask, reason)
    return selection

"""Rows through prepare, and what must be true of every funnel."""

import pandas as pd

from stages.common.schema import PrepareParams
from stages.conversations.held_out import by_hash
from stages.conversations.messages import message_row
from stages.prepare import prepare
from tests.support.rows import message

DEFAULTS = PrepareParams(
    dataset_weights=None,
    max_bad_rows=1.0,
    unsupported_rows="stop",
    threads="best",
    tree_states=["ready_for_export"],
    languages=[],
    min_quality=None,
    max_toxicity=None,
    allow_synthetic=True,
    require_review=True,
    min_turns=1,
    max_turns=None,
    max_similarity=None,
    validation_fraction=0.5,
    split_seed=0,
    system_prompt="",
)


def params(**changes) -> PrepareParams:
    """DEFAULTS with changes, which are checked."""
    return PrepareParams(**{**DEFAULTS.model_dump(), **changes})


def frame(rows: list[dict], split: str | None = None) -> pd.DataFrame:
    """The table of messages of flat OASST1 rows."""
    table = pd.DataFrame([message_row(row, split=split) for row in rows])
    return table.astype({"rank": "Float64", "quality": "Float64", "toxicity": "Float64"}).assign(
        row=range(len(table)), dataset=0
    )


def run(rows, **changes):
    """`prepare` over message rows; both splits in one table, and the funnel."""
    messages = rows if isinstance(rows, pd.DataFrame) else frame(rows)
    splits, funnel = prepare(messages, params(**changes))
    return pd.concat([t.assign(split=name) for name, t in splits.items()], ignore_index=True), funnel


def trees_in_both_splits() -> list[dict]:
    """Two plain trees, so that neither split is ever empty. Of the two alone, the first is held out by seed 0."""
    names = [text.removeprefix("text of ") for text in by_hash([f"text of pair{i}" for i in range(2)], 0)]
    return [row for n in names for row in (message(n, role="prompter"), message(f"{n}.a", n))]


def two_datasets(count: int) -> pd.DataFrame:
    """`count` trees of a first data set and as many of a second, which brings splits of its own."""
    first, second = ([message(f"{n}{i}", role="prompter") for i in range(count)] for n in "ab")
    answers = [message(f"{row['message_id']}.x", row["message_id"]) for row in [*first, *second]]
    ours = frame(first + answers[:count])
    held_out_rows = frame(second[:2] + answers[count : count + 2], "validation")
    theirs = pd.concat([held_out_rows, frame(second[2:] + answers[count + 2 :], "train")])
    return pd.concat([ours, theirs.assign(dataset=1)], ignore_index=True)


def ids(conversations: pd.DataFrame, tree: str) -> list[list[str]]:
    """The message ids of a tree's conversations."""
    chosen = conversations[conversations["message_tree_id"] == tree]
    return [list(i) for i in chosen["message_ids"]]


def check_funnel(funnel: dict) -> None:
    """What was read is what was dropped and what was kept: in all, step by step, and by language."""
    for what in ("messages", "trees", "characters"):
        dropped = sum(step[what] for step in funnel["dropped"].values())
        kept = sum(split[what] for split in funnel["kept"].values())
        assert funnel["read"][what] == dropped + kept, what
    for what in ("messages", "trees"):
        left = funnel["read"][what]
        for step in funnel["dropped"].values():
            left -= step[what]
            assert step[f"{what}_left"] == left
    for step in [funnel["read"], *funnel["dropped"].values(), *funnel["kept"].values()]:
        for what in ("messages", "characters"):
            assert sum(language[what] for language in step["by_language"].values()) == step[what]

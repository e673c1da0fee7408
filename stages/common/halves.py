"""The two halves of the held-out conversations: one to choose by, one to judge by.

What chose a checkpoint or a learning rate flatters what it chose. So the loss curve, the best checkpoint and early
stopping see the first half, and evaluate and export report the second.
"""

import hashlib

import pandas as pd


def _judges(trees: pd.Series) -> pd.Series:
    """Which conversations judge: those of every second tree, in the order of the hashes of the trees' names."""
    names = sorted(trees.unique(), key=lambda name: hashlib.sha256(str(name).encode()).digest())
    return trees.isin(names[1::2] or names)  # a single tree does both


def judging(rows: pd.DataFrame) -> pd.DataFrame:
    """The held-out conversations that took no part in any choice (`rows` has message_tree_id), numbered anew."""
    return rows[_judges(rows["message_tree_id"])].reset_index(drop=True)


def choosing(rows: pd.DataFrame) -> pd.DataFrame:
    """The other held-out conversations, numbered anew; those of a single tree are both."""
    others = rows[~_judges(rows["message_tree_id"])]
    return (others if len(others) else rows).reset_index(drop=True)

"""Rows of data sets, made on the spot."""

import json
from pathlib import Path


def message(message_id: str, parent: str | None = None, role: str = "assistant", **fields) -> dict:
    """A message row in OASST1's flat schema; the tree is the part of the id before the first dot."""
    row = {
        "message_id": message_id,
        "parent_id": parent,
        "message_tree_id": message_id.split(".")[0],
        "tree_state": "ready_for_export",
        "text": f"text of {message_id}",
        "role": role,
        "lang": "en",
        "rank": None,
        "deleted": False,
        "synthetic": False,
        "review_result": True,
        "labels": None,
        "detoxify": None,
    }
    return {**row, **fields}


def small_trees(count: int) -> list[dict]:
    """`count` trees of a question and an answer in two words each, all different."""
    rows = []
    for i in range(count):
        rows.append(message(f"t{i}", role="prompter", text=f"What is {i} + 1?"))
        rows.append(message(f"t{i}.a", f"t{i}", text=f"It is {i + 1}."))
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

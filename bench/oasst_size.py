"""OASST1-shaped data at OASST1's full size: as many messages, trees and languages, with like branching and lengths."""

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

# The all-trees export of OASST1: every tree, and those of them that are ready (the hub's two splits).
TREES, MESSAGES = 66_497, 161_443
READY_TREES, READY_MESSAGES = 10_364, 88_838
SPLITS = {"train": 84_437, "validation": 4_401}
# Shares of the 35 languages: English and Spanish make up most, then a long tail.
LANGUAGES = (
    "en es ru zh de fr th pt-BR ca ko uk-UA it ja pl eu vi hu ar da tr sv fi nl id cs he ro bn eo nb-NO gl el bg sk lt"
).split()
WEIGHTS = [1 / (1 + i) ** 1.6 for i in range(len(LANGUAGES))]
WORDS = "the of and to in is you that it he was for on are as with his they at be this have from or one had by".split()
# Other scripts take two or four bytes a character in memory where English takes one.
SCRIPTS = {
    "ru": "это как для что мы можем сделать если бы только знали".split(),
    "uk-UA": "це як для що ми можемо зробити якби тільки знали".split(),
    "zh": "我们 可以 这样 做 因为 天空 是 蓝色 的 谢谢".split(),
    "ja": "これは どうして 空が 青い のですか ありがとう ございます".split(),
    "ko": "이것은 어떻게 하늘이 파란 이유를 알려 주세요".split(),
    "th": "สวัสดี ทำไม ท้องฟ้า เป็น สีฟ้า ขอบคุณ".split(),
    "ar": "لماذا السماء زرقاء شكرا جزيلا على المساعدة".split(),
    "en": [*WORDS, "😀"],
}
WORDS_OF_A_MESSAGE = {"prompter": (3.3, 0.8), "assistant": (5.1, 0.8)}  # mean and deviation of the logarithm


def sizes(trees: int, messages: int, generator: random.Random) -> list[int]:
    """`trees` sizes of at least one message that add up to `messages`."""
    counts = [1] * trees
    for _ in range(messages - trees):
        counts[min(int(generator.random() ** 1.5 * trees), trees - 1)] += 1
    return counts


def tree(number: int, size: int, state: str, generator: random.Random) -> dict:
    """A nested tree of `size` messages: replies alternate, siblings are ranked where there are several.

    Some of the worst-ranked answers were deleted, or rejected by reviewers: no best-ranked thread loses one.
    """
    lang = generator.choices(LANGUAGES, WEIGHTS)[0]
    nodes: list[dict[str, Any]] = []
    depth: list[int] = []
    for i in range(size):
        parent = None if not nodes else generator.randrange(max(0, len(nodes) - 6), len(nodes))
        level = 0 if parent is None else depth[parent] + 1
        role = ["prompter", "assistant"][level % 2]
        length = 1 + int(generator.lognormvariate(*WORDS_OF_A_MESSAGE[role]))
        node: dict[str, Any] = {
            "message_id": f"{number:08x}-{i:04x}",
            "text": f"{number} {i} " + " ".join(generator.choices(SCRIPTS.get(lang, WORDS), k=min(length, 1000))),
            "role": role,
            "lang": lang,
            "review_count": 3,
            "review_result": True,
            "deleted": False,
            "synthetic": False,
            "detoxify": {"toxicity": generator.random() / 10, "severe_toxicity": 0.0, "obscene": 0.0, "insult": 0.0},
            "emojis": {"+1": 1},
            "labels": {"spam": {"value": 0.0, "count": 3}, "quality": {"value": generator.random(), "count": 3}},
            "replies": [],
        }
        if parent is not None:
            node["parent_id"] = nodes[parent]["message_id"]
            nodes[parent]["replies"].append(node)
        nodes.append(node)
        depth.append(level)
    for node in nodes:
        answers = node["replies"]
        if node["role"] == "prompter" and len(answers) > 1:
            for rank, answer in enumerate(answers):
                answer["rank"] = rank
            if not answers[-1]["replies"]:
                chance = generator.random()
                answers[-1]["deleted"] = chance < 0.05
                answers[-1]["review_result"] = chance < 0.95
    return {"message_tree_id": nodes[0]["message_id"], "tree_state": state, "prompt": nodes[0]}


def ready_trees(generator: random.Random) -> Iterator[dict]:
    """The trees that are ready for export."""
    for number, size in enumerate(sizes(READY_TREES, READY_MESSAGES - READY_TREES, generator)):
        yield tree(number, size + 1, "ready_for_export", generator)  # each has an answer


def other_trees(generator: random.Random) -> Iterator[dict]:
    """The many more that never grew far enough."""
    for number, size in enumerate(sizes(TREES - READY_TREES, MESSAGES - READY_MESSAGES, generator), READY_TREES):
        yield tree(number, size, "prompt_lottery_waiting" if size == 1 else "aborted_low_grade", generator)


def messages_of(tree: dict) -> Iterator[dict]:
    """The messages of a nested tree in the hub's flat schema, parents before their replies."""
    stack = [tree["prompt"]]
    while stack:
        node = stack.pop()
        stack.extend(reversed(node["replies"]))
        labels = node["labels"]
        yield {
            **{key: value for key, value in node.items() if key not in ("replies", "labels", "emojis")},
            "parent_id": node.get("parent_id"),
            "rank": node.get("rank"),
            "message_tree_id": tree["message_tree_id"],
            "tree_state": tree["tree_state"],
            "emojis": {"name": ["+1"], "count": [1]},
            "labels": {
                "name": list(labels),
                "value": [label["value"] for label in labels.values()],
                "count": [label["count"] for label in labels.values()],
            },
        }


def write_trees(path: Path, *, ready_alone: bool, seed: int = 0) -> Counter:
    """An export file (nested, gzip); returns how many of its ready messages were deleted, and rejected."""
    generator = random.Random(seed)
    marked: Counter = Counter()
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for made in ready_trees(generator):
            for row in messages_of(made):
                marked["deleted" if row["deleted"] else "kept" if row["review_result"] else "rejected"] += 1
            file.write(json.dumps(made) + "\n")
        for made in () if ready_alone else other_trees(generator):
            file.write(json.dumps(made) + "\n")
    return marked


def write_splits(folder: Path, seed: int = 0) -> Counter:
    """The ready trees as the hub's two splits, parquet; returns how many messages were deleted, and rejected."""
    marked: Counter = Counter()
    schema, left = None, dict(SPLITS)
    writers: dict[str, ParquetWriter] = {}
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for made in ready_trees(random.Random(seed)):
        messages = list(messages_of(made))
        # Trees go whole into a split; the small ones fill what is left of it to the last message.
        split = "validation" if len(messages) <= left["validation"] else "train"
        left[split] -= len(messages)
        rows[split] += messages
        for row in messages:
            marked["deleted" if row["deleted"] else "kept" if row["review_result"] else "rejected"] += 1
    assert not any(left.values()), left
    for split, all_rows in rows.items():
        schema = schema or pa.Table.from_pylist(all_rows[:5000]).schema
        writers[split] = ParquetWriter(folder / f"{split}.parquet", schema)
        for start in range(0, len(all_rows), 5000):
            writers[split].write_table(pa.Table.from_pylist(all_rows[start : start + 5000], schema))
        writers[split].close()
    return marked

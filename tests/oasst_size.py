"""OASST1-shaped data at OASST1's full size: as many messages, trees and languages, with like branching and lengths."""

import gzip
import json
import random
from pathlib import Path

# The all-trees export of OASST1: every tree, and those of them that are ready (the hub's two splits).
TREES, MESSAGES = 66_497, 161_443
READY_TREES, READY_MESSAGES = 10_364, 88_838
# Shares of the 35 languages: English and Spanish make up most, then a long tail.
LANGUAGES = ["en", "es", "ru", "zh", "de", "fr", "th", "pt-BR", "ca", "ko", "uk-UA", "it", "ja", "pl", "eu", "vi", "hu"]
LANGUAGES += [
    "ar",
    "da",
    "tr",
    "sv",
    "fi",
    "nl",
    "id",
    "cs",
    "he",
    "ro",
    "bn",
    "eo",
    "nb-NO",
    "gl",
    "el",
    "bg",
    "sk",
    "lt",
]
WEIGHTS = [1 / (1 + i) ** 1.6 for i in range(len(LANGUAGES))]
WORDS = "the of and to in is you that it he was for on are as with his they at be this have from or one had by".split()


def sizes(trees: int, messages: int, generator: random.Random) -> list[int]:
    """`trees` sizes of at least one message that add up to `messages`."""
    counts = [1] * trees
    for _ in range(messages - trees):
        counts[min(int(generator.random() ** 1.5 * trees), trees - 1)] += 1
    return counts


def tree(number: int, size: int, state: str, generator: random.Random) -> dict:
    """A nested tree of `size` messages: replies alternate, siblings are ranked where there are several."""
    lang = generator.choices(LANGUAGES, WEIGHTS)[0]
    nodes: list[dict] = []
    depth: list[int] = []
    for i in range(size):
        parent = None if not nodes else generator.randrange(max(0, len(nodes) - 6), len(nodes))
        level = 0 if parent is None else depth[parent] + 1
        node = {
            "message_id": f"{number:08x}-{i:04x}",
            "text": f"{number} {i} " + " ".join(generator.choices(WORDS, k=generator.randint(8, 90))),
            "role": ["prompter", "assistant"][level % 2],
            "lang": lang,
            "review_count": 3,
            "review_result": True,
            "deleted": False,
            "synthetic": False,
            "emojis": {"+1": 1},
            "labels": {"spam": {"value": 0.0, "count": 3}, "quality": {"value": generator.random(), "count": 3}},
            "replies": [],
        }
        if parent is not None:
            node["parent_id"] = nodes[parent]["message_id"]
            siblings = nodes[parent]["replies"]
            siblings.append(node)
            if level % 2 and len(siblings) > 1:
                for rank, sibling in enumerate(siblings):
                    sibling["rank"] = rank
        nodes.append(node)
        depth.append(level)
    return {"message_tree_id": nodes[0]["message_id"], "tree_state": state, "prompt": nodes[0]}


def write_all_trees(path: Path, seed: int = 0) -> None:
    """The all-trees export (nested, gzip): ready trees, and the many more that never grew far enough."""
    generator = random.Random(seed)
    ready = sizes(READY_TREES, READY_MESSAGES - READY_TREES, generator)  # one answer each comes on top
    other = sizes(TREES - READY_TREES, MESSAGES - READY_MESSAGES, generator)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for number, size in enumerate(ready):
            file.write(json.dumps(tree(number, size + 1, "ready_for_export", generator)) + "\n")
        for number, size in enumerate(other, len(ready)):
            state = "prompt_lottery_waiting" if size == 1 else "aborted_low_grade"
            file.write(json.dumps(tree(number, size, state, generator)) + "\n")

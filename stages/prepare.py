"""Turn message trees into conversations: choose threads, filter, deduplicate, split.

Reads data/raw/1/, … (.jsonl, .jsonl.gz or .parquet; rows are OASST1's messages, flat or as nested trees, or
conversations in a `messages` column, or `instruction` and `response` columns).
Writes data/prepared/{train,validation}.parquet (one conversation a row; params.json beside them says how they were
chosen) and reports/funnel.json (how many messages,
trees, conversations and characters each step dropped and kept, by reason and by language). Run: `dvc repro prepare`
"""

import codecs
import gzip
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.artifacts import read_json, write_json, write_whole
from stages.common.errors import StageError, first_line, run_stage
from stages.common.params import load_params

RAW = Path("data/raw")
PREPARED = Path("data/prepared")
FUNNEL = Path("reports/funnel.json")

ROLES = {"prompter": "user", "assistant": "assistant"}
# What a row must have to be a message at all; everything else is read where it is there.
REQUIRED = ("message_id", "text", "role")
# Messages and trees of data sets at commits that many have counted.
OASST1 = "fdf72ae0827c1cda404aff25b6603abec9e3399b"
KNOWN_COUNTS = {
    ("OpenAssistant/oasst1", OASST1): (88_838, 10_364),
    ("OpenAssistant/oasst1/2023-04-12_oasst_ready.trees.jsonl.gz", OASST1): (88_838, 10_364),
    ("OpenAssistant/oasst1/2023-04-12_oasst_all.trees.jsonl.gz", OASST1): (161_443, 66_497),
}
SPLITS = ("train", "validation", "test")
UNKNOWN = "unknown"  # the language of a row that states none
# What instruction data sets call their two columns.
INSTRUCTION_COLUMNS = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
)


# Reading ---------------------------------------------------------------------------------------------------------


def read_messages(folder: Path, dataset: int = 0) -> pd.DataFrame:
    """All message rows under `folder`, in file order, with the hub split a file's name states (None elsewhere).

    Columns: message_id, parent_id, message_tree_id (of the second data set on behind its number), tree_state, text,
    role, lang, rank, deleted, synthetic, review_result, quality, toxicity, system, split, bad (where and why a row is
    no message, None elsewhere), dataset (as given).
    """
    files = sorted(p for p in folder.glob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    if not files:
        raise StageError(f"{folder} holds no .jsonl, .jsonl.gz or .parquet file. Check `dataset` in params.yaml.")
    rows = []
    for file in files:
        name = re.sub(r"[.](jsonl|jsonl[.]gz|parquet)$", "", file.name)
        place = "row" if file.suffix == ".parquet" else "line"
        for number, top in read_rows(file):
            where = f"{file.name} {place} {number}"
            if isinstance(top, str):
                rows.append({**message_row({}, split_of(file)), "bad": f"{where}: {top}"})
                continue
            for row in flatten(top, f"{name}-{number}"):
                rows.append(message_row(row, split_of(file), where))
    if not rows:
        raise StageError(f"{folder}: the data files hold no rows. Check `dataset` in params.yaml.")
    table = pd.DataFrame(rows).astype({"rank": "Float64", "quality": "Float64", "toxicity": "Float64"})
    if dataset:  # two data sets may use the same ids for other messages
        for name in ("message_id", "parent_id", "message_tree_id"):
            table[name] = [f"{dataset + 1}/{text}" if isinstance(text, str) else text for text in table[name]]
    return table.assign(dataset=dataset)


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number and content of each row of a data file, or in its place what keeps it from being read.

    Raises StageError that names the file when it cannot be read on.
    """
    try:
        if file.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            batches = ParquetFile(file).iter_batches(1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
    except Exception as error:  # gzip, zlib and pyarrow have their own
        raise StageError(
            f"{file.name} cannot be read ({first_line(error)}). Is it damaged? Put a whole one there, then `dvc repro`."
        ) from None


def parse_line(line: bytes) -> dict[str, Any] | str:
    """The JSON object on a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        beginning = line[:30].decode("utf-8", "replace").strip()
        return f"not valid JSON ({error.msg}); it begins with {beginning!r}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return f"not JSON that can be read ({first_line(error)})"
    return row if isinstance(row, dict) else "not a JSON object"


def split_of(file: Path) -> str | None:
    """The split that a file's name starts with, else None."""
    return next((name for name in SPLITS if file.name.startswith(name)), None)


def flatten(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The messages of a row, whatever its form: a message itself, a nested tree, or a conversation called `name`."""
    if not isinstance(row.get("prompt"), dict):
        turns = turns_of(row)
        yield from [row] if turns is None else chain(turns, name, row)
        return
    tree = {"message_tree_id": row.get("message_tree_id"), "tree_state": row.get("tree_state")}
    # An explicit stack: a tree may be deeper than Python recurses. Replies go on it last first, to come off in order.
    stack = [row["prompt"]]
    while stack:
        message = stack.pop()
        replies = message.get("replies")
        for reply in reversed(replies if isinstance(replies, list) else []):
            # Whatever else stands among the replies is a row of its own, and a bad one.
            reply = reply if isinstance(reply, dict) else {}
            stack.append({"parent_id": message.get("message_id"), **reply})
        yield {**message, **tree}


def turns_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The role/content turns of a row that is a conversation: `messages`, or an instruction and its response."""
    if isinstance(row.get("messages"), list):
        # An empty conversation, or what is no turn in one, is still a row: a bad one, which is counted.
        return [dict(turn) if isinstance(turn, dict) else {} for turn in row["messages"]] or [{}]
    for question, answer in INSTRUCTION_COLUMNS:
        if question in row and answer in row and "message_id" not in row:
            text, context = row[question], row.get("input")
            if isinstance(text, str) and isinstance(context, str) and context.strip():
                text = f"{text}\n\n{context}"
            return [{"role": "user", "content": text}, {"role": "assistant", "content": row[answer]}]
    return None


def chain(turns: list[dict[str, Any]], name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Turns as message rows, each the reply to the one before; a system turn goes with the root."""
    shared: dict[str, Any] = {
        key: row[key] for key in ("lang", "synthetic", "deleted", "detoxify", "labels") if key in row
    }
    system = next((t.get("content") for t in turns if t.get("role") == "system"), None)
    parent = None
    for i, turn in enumerate(t for t in turns if t.get("role") != "system"):
        message_id = f"{name}.{i}"
        role = {"user": "prompter", "human": "prompter", "gpt": "assistant"}.get(
            str(turn.get("role")), turn.get("role")
        )
        yield {
            **shared,
            "message_id": message_id,
            "parent_id": parent,
            "message_tree_id": name,
            "text": turn.get("content"),
            "role": role,
            "system": system if parent is None else None,
        }
        parent = message_id


def message_row(row: dict[str, Any], split: str | None, where: str = "a row") -> dict[str, Any]:
    """The fields of a message that this stage uses, with one spelling for missing values (None)."""

    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = row.get(name)
        return value if isinstance(value, kind) else default

    def number(value: Any) -> float | None:
        # Python's whole numbers may be too large for a float.
        return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None

    labels, detoxify = row.get("labels"), row.get("detoxify")
    quality = None
    if isinstance(labels, dict):
        names, values = labels.get("name"), labels.get("value")
        if isinstance(labels.get("quality"), dict):  # nested export: {quality: {value, count}}
            quality = labels["quality"].get("value")
        elif isinstance(names, list) and isinstance(values, list):  # flat rows
            quality = next((value for name, value in zip(names, values, strict=False) if name == "quality"), None)
    message_id = get("message_id", str)
    fields = {
        "message_id": message_id,
        "parent_id": get("parent_id", str),
        "message_tree_id": get("message_tree_id", str, message_id),
        "tree_state": get("tree_state", str),
        "text": get("text", str),
        "role": get("role", str),
        "lang": get("lang", str, UNKNOWN),
        "rank": number(row.get("rank")),
        "deleted": get("deleted", bool, False),
        "synthetic": get("synthetic", bool, False),
        "review_result": get("review_result", bool),
        "quality": number(quality),
        "toxicity": number(detoxify.get("toxicity")) if isinstance(detoxify, dict) else None,
        "system": get("system", str),
        "split": split,
    }
    problem = bad_field(row, fields)
    # A table cannot even hold a text that is none.
    written = {name: None if text_problem(value) else value for name, value in fields.items()}
    return {**written, "lang": written["lang"] or UNKNOWN, "bad": f"{where}: {problem}" if problem else None}


def bad_field(row: dict[str, Any], fields: dict[str, Any]) -> str | None:
    """What keeps a row from being a message: a missing or mistyped field, an unknown role, text that is none."""
    for name in REQUIRED:
        if fields[name] is None:
            return f"{name} is missing" if row.get(name) is None else f"{name} is {shown(row[name])}, not a text"
    if fields["role"] not in ROLES:
        return f"role is {shown(fields['role'])}, neither prompter nor assistant"
    parent = row.get("parent_id")
    if fields["parent_id"] is None and isinstance(parent, int | float | list | dict) and parent == parent:
        return f"parent_id is {shown(parent)}, not a text"
    return next((f"{name} holds {why}" for name, value in fields.items() if (why := text_problem(value))), None)


def text_problem(value: Any) -> str | None:
    """Why a text cannot be trained on or written, if it is one."""
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return "a NUL character"
    try:
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return None


def shown(value: Any) -> str:
    """A value as an error line shows it, cut to a few characters and to what can be printed."""
    return ascii(value)[:40]


# Counting --------------------------------------------------------------------------------------------------------


@dataclass
class Funnel:
    """What every step dropped, by reason and language. Messages, trees and characters add up to what was read."""

    read: dict[str, Any]
    dropped: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def count(messages: pd.DataFrame) -> dict[str, Any]:
        """Messages, trees and characters of `messages`, in all and by language."""

        def figures(part: pd.DataFrame) -> dict[str, int]:
            return {
                "messages": len(part),
                "trees": int(part["message_tree_id"].nunique()),
                "characters": int(part["text"].str.len().sum()),
            }

        return {**figures(messages), "by_language": {k: figures(v) for k, v in messages.groupby("lang", sort=True)}}

    def drop(self, messages: pd.DataFrame, keep: pd.Series, reason: str, conversations: int = 0) -> pd.DataFrame:
        """Count the messages where `keep` is False under `reason`; return the others.

        A tree counts as dropped by the step that takes its last message; `conversations` is how many whole
        conversations the step dropped.
        """
        kept, gone = messages[keep], messages[~keep]
        counts = self.count(gone)
        counts["trees"] = int((~gone["message_tree_id"].drop_duplicates().isin(kept["message_tree_id"])).sum())
        left = {"messages_left": len(kept), "trees_left": int(kept["message_tree_id"].nunique())}
        self.dropped[reason] = {**counts, "conversations": conversations, **left}
        return kept


# Choosing messages -----------------------------------------------------------------------------------------------


def check_bad_rows(bad: pd.Series, max_bad_rows: float) -> None:
    """Raise StageError, naming the first, when more than a share `max_bad_rows` of the rows are no messages."""
    found = bad.dropna()
    if len(found) > max_bad_rows * len(bad):
        raise StageError(
            f"{RAW}: {len(found)} of {len(bad)} rows are no messages, more than max_bad_rows, {max_bad_rows}. "
            f"The first: {found.iloc[0]}. Mend the data, or raise max_bad_rows to skip such rows."
        )


def valid_rows(messages: pd.DataFrame, funnel: Funnel) -> pd.DataFrame:
    """Drop rows that are no messages, second rows of the same id, and messages whose tree does not reach its root."""
    messages = funnel.drop(messages, messages["bad"].isna(), "bad_row")
    messages = funnel.drop(messages, messages["text"].str.strip() != "", "empty")
    messages = funnel.drop(messages, ~messages["message_id"].duplicated(), "duplicate_id")
    return funnel.drop(messages, reachable(messages), "orphan")


def reachable(messages: pd.DataFrame) -> pd.Series:
    """Which messages hang together, parent by parent, with a root of their own tree that is among `messages`."""
    children: dict[str, list[str]] = {}
    for message_id, parent_id in zip(messages["message_id"], messages["parent_id"], strict=True):
        if isinstance(parent_id, str):
            children.setdefault(parent_id, []).append(message_id)
    found: set[str] = set()
    frontier = list(messages.loc[messages["parent_id"].isna(), "message_id"])
    while frontier:
        found.update(frontier)
        frontier = [child for parent in frontier for child in children.get(parent, ())]
    return messages["message_id"].isin(found)


def choose_splits(messages: pd.DataFrame, funnel: Funnel) -> pd.DataFrame:
    """Settle the splits that each data set brings: its validation split, or for want of it its test split, is held out.

    A test split beside a validation split, and rows outside the two, are dropped: they are kept for others to test on.
    Where a data set has no such pair of splits, `split` is None on all its rows.
    """
    split = messages["split"].copy()
    for _, names in messages.groupby("dataset")["split"]:
        held_out_name = next((name for name in ("validation", "test") if (names == name).any()), None)
        if held_out_name is None or not (names == "train").any():
            split[names.index] = None
        else:
            split[names.index] = names.map({"train": "train", held_out_name: "validation"}).fillna("other")
    messages = messages.assign(split=split)
    return funnel.drop(messages, messages["split"].ne("other"), "other_split")


def filter_messages(
    messages: pd.DataFrame,
    funnel: Funnel,
    *,
    tree_states: list[str],
    languages: list[str],
    min_quality: float | None,
    max_toxicity: float | None,
    allow_synthetic: bool,
    require_review: bool,
) -> pd.DataFrame:
    """Drop messages by what is known of them, then those that hung below a dropped one. What is unknown passes."""
    if tree_states:
        keep = messages["tree_state"].isna() | messages["tree_state"].isin(tree_states)
        messages = funnel.drop(messages, keep, "tree_state")
    messages = funnel.drop(messages, ~messages["deleted"].astype(bool), "deleted")
    if require_review:
        messages = funnel.drop(messages, messages["review_result"].ne(False), "rejected_in_review")
    if not allow_synthetic:
        messages = funnel.drop(messages, ~messages["synthetic"].astype(bool), "synthetic")
    if languages:
        messages = funnel.drop(messages, messages["lang"].isin([*languages, UNKNOWN]), "language")
    if min_quality is not None:
        low = (messages["role"] == "assistant") & (messages["quality"] < min_quality).fillna(False)
        messages = funnel.drop(messages, ~low, "quality")
    if max_toxicity is not None:
        messages = funnel.drop(messages, ~(messages["toxicity"] > max_toxicity).fillna(False), "toxicity")
    return funnel.drop(messages, reachable(messages), "below_a_dropped_message")


# Threads ---------------------------------------------------------------------------------------------------------


Thread = tuple[str, ...]  # the message ids from a root to an answer


def right_roles(messages: pd.DataFrame) -> pd.Series:
    """Which messages can stand in a conversation: a root that asks, and below it replies in the other role."""
    role = messages.set_index("message_id")["role"]
    parent_role = messages["parent_id"].map(role)
    return (parent_role.isna() & (messages["role"] == "prompter")) | (
        parent_role.notna() & (parent_role != messages["role"])
    )


def find_threads(messages: pd.DataFrame, which: str) -> list[Thread]:
    """The conversations of all trees, in the order of their roots; every one ends on the assistant.

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
            if ids and ids[-1] not in seen:  # else only a question, or the beginning of a thread before it
                threads[tuple(ids)] = None
                seen.update(ids)
    return list(threads)


def unanswered(messages: pd.DataFrame) -> pd.Series:
    """Which messages are questions that nobody answered."""
    return (messages["role"] == "prompter") & ~messages["message_id"].isin(messages["parent_id"].dropna())


def trained_answers(threads: list[Thread]) -> list[list[bool]]:
    """For each answer of each thread, whether it is trained on there: only in the first thread that holds it."""
    seen: set[str] = set()
    flags = []
    for ids in threads:
        flags.append([i not in seen for i in ids[1::2]])
        seen.update(ids)
    return flags


def _paths(root: str, replies: dict[str, list[str]], only_best: bool) -> Iterator[list[str]]:
    """Every root-to-leaf path below `root`, best-ranked replies first; with `only_best`, just the first of them."""
    stack = [[root]]
    while stack:
        path = stack.pop()
        following = replies.get(path[-1], [])
        if not following:
            yield path
            if only_best:
                return
        stack.extend([*path, reply] for reply in reversed(following))


def normalised(text: str) -> str:
    """`text` without what makes copies look different: Unicode form, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def near_duplicates(texts: list[str], max_similarity: float) -> list[bool]:
    """Which texts share more than `max_similarity` of their word triples with an earlier one that is kept.

    The Jaccard similarity is estimated from 128 MinHash permutations (Broder, On the resemblance and containment of
    documents, 1997): its standard error is at most 0.05.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=max_similarity, num_perm=128)
    hashes: dict[int, MinHash] = {}
    copies = []
    for number, text in enumerate(texts):
        words = text.split()
        minhash = MinHash(num_perm=128, seed=1)
        minhash.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
        copy = any(hashes[other].jaccard(minhash) > max_similarity for other in index.query(minhash))
        copies.append(copy)
        if not copy:
            hashes[number] = minhash
            index.insert(number, minhash)
    return copies


def held_out(tree_id: str, fraction: float, seed: int) -> bool:
    """Whether a tree belongs to the validation split: by a hash, so that other trees coming or going move none."""
    digest = hashlib.sha256(f"{seed}:{tree_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def weighted(threads: list[Thread], weight: float, seed: int) -> list[Thread]:
    """`threads` as often as `weight` says: each `weight` times; a fraction's part of them, drawn by hash, once more.

    The order stays; a repetition follows the one before it.
    """
    times, part = divmod(weight, 1)
    by_hash = sorted(threads, key=lambda ids: hashlib.sha256(f"{seed}:{ids}".encode()).digest())
    once_more = set(by_hash[: round(part * len(threads))])
    return [ids for ids in threads for _ in range(int(times) + (ids in once_more))]


def prepare(
    messages: pd.DataFrame,
    *,
    dataset_weights: list[float] | None,
    max_bad_rows: float,
    threads: str,
    tree_states: list[str],
    languages: list[str],
    min_quality: float | None,
    max_toxicity: float | None,
    allow_synthetic: bool,
    require_review: bool,
    min_turns: int,
    max_turns: int | None,
    max_similarity: float | None,
    validation_fraction: float,
    split_seed: int,
    system_prompt: str,
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Message rows (see `read_messages`) to conversations, by split, and the funnel of counts.

    A conversation has message_tree_id, message_ids, dataset (0, 1, …), lang (of its first message), messages (role and
    content, as TRL reads them; first its own system turn or the system prompt, unless that is empty) and trained (one
    flag for each assistant message). `dataset_weights` shape the training split alone (see `weighted`). Raises
    StageError when too many rows are bad, or nothing is left for a split.
    """
    check_bad_rows(messages["bad"], max_bad_rows)
    funnel = Funnel(Funnel.count(messages.fillna({"text": "", "message_tree_id": ""})))
    messages = valid_rows(messages, funnel)
    messages = filter_messages(
        messages,
        funnel,
        tree_states=tree_states,
        languages=languages,
        min_quality=min_quality,
        max_toxicity=max_toxicity,
        allow_synthetic=allow_synthetic,
        require_review=require_review,
    )

    messages = choose_splits(messages, funnel)
    messages = funnel.drop(messages, right_roles(messages), "wrong_role")
    messages = funnel.drop(messages, reachable(messages), "below_a_wrong_role")
    messages = funnel.drop(messages, ~unanswered(messages), "unanswered_question")
    found = find_threads(messages, threads)
    messages = _only_used(messages, found, funnel, "other_thread")
    if max_turns is not None:
        found = list(dict.fromkeys(ids[: 2 * max_turns] for ids in found))
    messages = _only_used(messages, found, funnel, "beyond_max_turns")
    long_enough = [ids for ids in found if len(ids) >= 2 * min_turns]
    messages = _only_used(messages, long_enough, funnel, "below_min_turns", len(found) - len(long_enough))

    by_id = messages.set_index("message_id")
    text, tree, lang = (by_id[name].to_dict() for name in ("text", "message_tree_id", "lang"))
    role, split, own_system, dataset = (by_id[name].to_dict() for name in ("role", "split", "system", "dataset"))

    def in_validation(ids: Thread) -> bool:
        if isinstance(split[ids[0]], str):
            return split[ids[0]] == "validation"
        return held_out(tree[ids[0]], validation_fraction, split_seed)

    # Of two equal conversations the held-out one stays: a published validation split keeps its size.
    unique: dict[tuple[str, ...], Thread] = {}
    for ids in sorted(long_enough, key=lambda ids: not in_validation(ids)):
        unique.setdefault(tuple(normalised(text[i]) for i in ids), ids)
    chosen = set(unique.values())
    kept = [ids for ids in long_enough if ids in chosen]
    messages = _only_used(messages, kept, funnel, "duplicate_conversation", len(long_enough) - len(kept))

    if max_similarity is not None:
        first = sorted(kept, key=lambda ids: not in_validation(ids))
        near = near_duplicates([" ".join(normalised(text[i]) for i in ids) for ids in first], max_similarity)
        chosen = {ids for ids, copy in zip(first, near, strict=True) if not copy}
        messages = _only_used(messages, list(chosen), funnel, "near_duplicate", len(kept) - len(chosen))
        kept = [ids for ids in kept if ids in chosen]

    # A held-out question must be new to the model, even where its answers differ or it comes up in mid-conversation.
    questions = {normalised(text[ids[0]]) for ids in kept if in_validation(ids)}
    clean = [ids for ids in kept if in_validation(ids) or not questions & {normalised(text[i]) for i in ids[::2]}]
    messages = _only_used(messages, clean, funnel, "question_is_held_out", len(kept) - len(clean))
    kept = clean
    train = [ids for ids in kept if not in_validation(ids)]
    validation = [ids for ids in kept if in_validation(ids)]
    if dataset_weights is not None:
        train = [
            ids
            for number, weight in enumerate(dataset_weights)
            for ids in weighted([ids for ids in train if dataset[ids[0]] == number], weight, split_seed)
        ]
        unused = len(kept) - len(validation) - len(set(train))
        messages = _only_used(messages, validation + train, funnel, "below_weight", unused)

    def messages_of(ids: Thread) -> list[dict[str, str]]:
        own = own_system[ids[0]]
        system = own if isinstance(own, str) else system_prompt
        first = [{"role": "system", "content": system}] if system else []
        return first + [{"role": ROLES[role[i]], "content": text[i].strip()} for i in ids]

    splits: dict[str, pd.DataFrame] = {}
    counts = {}
    for name, members in (
        ("train", train),
        ("validation", validation),
    ):
        if not members:
            raise StageError(
                f"no conversation is left for {name}: {len(kept)} of {funnel.read['trees']} trees passed the filters. "
                "Loosen the filters or change validation_fraction in params.yaml."
            )
        distinct = list(dict.fromkeys(members))  # a weight may repeat a thread, which is trained on as often
        flags = dict(zip(distinct, trained_answers(distinct), strict=True))
        splits[name] = pd.DataFrame(
            {
                "message_tree_id": [tree[ids[0]] for ids in members],
                "message_ids": [list(ids) for ids in members],
                "dataset": [dataset[ids[0]] for ids in members],
                "lang": [lang[ids[0]] for ids in members],
                "messages": [messages_of(ids) for ids in members],
                "trained": [flags[ids] for ids in members],
            }
        )
        used = messages[messages["message_id"].isin({i for ids in members for i in ids})]
        counts[name] = {**Funnel.count(used), "conversations": len(members)}
        if messages["dataset"].nunique() > 1:
            of_each = splits[name]["dataset"].value_counts()
            counts[name]["by_dataset"] = {str(number + 1): int(of_each[number]) for number in sorted(of_each.index)}
        for language, number in splits[name]["lang"].value_counts().items():
            counts[name]["by_language"][language]["conversations"] = int(number)
    return splits, {"read": funnel.read, "dropped": funnel.dropped, "kept": counts}


def _only_used(
    messages: pd.DataFrame, threads: list[Thread], funnel: Funnel, reason: str, conversations: int = 0
) -> pd.DataFrame:
    used = {message_id for ids in threads for message_id in ids}
    return funnel.drop(messages, messages["message_id"].isin(used), reason, conversations)


def read_sources(path: Path) -> list[dict[str, Any]]:
    """What fetch wrote of each data set. Raises StageError when it is no such list."""
    sources = read_json(path)
    if not (
        isinstance(sources, list)
        and sources
        and all(isinstance(s, dict) and {"source", "revision"} <= s.keys() for s in sources)
    ):
        raise StageError(f"{path} is not as fetch writes it. Delete it and run `dvc repro`.")
    return sources


def check_known(source: dict[str, Any], messages: int, trees: int) -> str | None:
    """A warning when a data set that everybody knows, at a known commit, was read with other counts; else None."""
    known = KNOWN_COUNTS.get((source["source"], source["revision"]))
    if known is None or known == (messages, trees):
        return None
    return (
        f"warning: {source['source']} at this commit has {known[0]} messages in {known[1]} trees, but "
        f"{messages} in {trees} were read. Fetch it again."
    )


def main() -> None:
    params = load_params("prepare")
    sources = read_sources(RAW / "source.json")
    tables = []
    for number, source in enumerate(sources):
        tables.append(read_messages(RAW / str(number + 1), number))
        if warning := check_known(source, len(tables[-1]), tables[-1]["message_tree_id"].nunique()):
            print(warning, file=sys.stderr, flush=True)
    splits, funnel = prepare(
        pd.concat(tables, ignore_index=True),
        dataset_weights=params.dataset_weights,
        max_bad_rows=params.max_bad_rows,
        threads=params.threads,
        tree_states=params.tree_states,
        languages=params.languages,
        min_quality=params.min_quality,
        max_toxicity=params.max_toxicity,
        allow_synthetic=params.allow_synthetic,
        require_review=params.require_review,
        min_turns=params.min_turns,
        max_turns=params.max_turns,
        max_similarity=params.max_similarity,
        validation_fraction=params.validation_fraction,
        split_seed=params.split_seed,
        system_prompt=params.system_prompt,
    )
    with write_whole(FUNNEL) as report, write_whole(PREPARED) as folder:
        write_json(report, funnel)
        folder.mkdir()
        for name, conversations in splits.items():
            conversations.to_parquet(folder / f"{name}.parquet", index=False)
        write_json(folder / "params.json", vars(params))
    kept = ", ".join(f"{len(c)} for {name}" for name, c in splits.items())
    print(f"prepare: {funnel['read']['messages']} messages in {funnel['read']['trees']} trees -> conversations: {kept}")


if __name__ == "__main__":
    run_stage(main, one_at_a_time=True)

"""Turn conversations into tokens by a chat template, and mark which tokens are the assistant's.

Reads data/prepared/ and the tokenizer of models/base/.
Writes data/tokenized/{train,validation}.parquet (input_ids, assistant_masks, length), data/tokenized/tokenizer/ (the
base model's tokenizer with the chosen template, end and padding token), data/tokenized/params.json (how the data were
made so far), reports/tokens.json (counts, and the tokens that end answers) and reports/tokens.html (a sample of
conversations, token by token).
Run: `dvc repro tokenize`
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from stages.common.artifacts import read_json, read_parquet, write_json, write_text, write_whole
from stages.common.chat import Chat, ChatError, Encoded, check_same_ids, has_marks, rendered_by
from stages.common.errors import StageError
from stages.common.left_out import aligned, is_much, left_out_warning
from stages.common.masks import supervised_tokens
from stages.common.model_files import load_config, load_tokenizer
from stages.common.params import TEMPLATES, load_params
from stages.common.schema import TokenizeParams
from stages.common.token_page import Shown, show_sample, token_page
from stages.common.truncation import cut_conversation

BASE = Path("models/base")
PREPARED = Path("data/prepared")
TOKENIZED = Path("data/tokenized")
TOKENS = Path("reports/tokens.json")
PAGE = Path("reports/tokens.html")

SPLITS = ("train", "validation")
PARAMETERS = {"too_long": "max_length", "late_system": "chat_template"}  # that govern what is left out
COLUMNS = ("messages", "trained", "lang", "message_tree_id")  # what is read of a conversation


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of a chat template. It needs no {% generation %} marks.

    `name` is a file of stages/templates/ without its ending, or `model` for the tokenizer's own, or TRL's form of it
    for the model families it knows: that keeps earlier turns the same as a conversation grows. Raises StageError when
    there is none.
    """
    if name == "model":
        if tokenizer.chat_template is None:
            raise StageError("chat_template: model: the base model has no chat template; use chatml or phi2.")
        template = str(tokenizer.chat_template)
        try:
            return template if has_marks(template) else str(get_training_chat_template(tokenizer) or template)
        except ValueError:  # a family that TRL does not know
            return template
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise StageError(f"chat_template: {path} does not exist. Set it to one of: {names}, model.")
    return path.read_text(encoding="utf-8")


def set_special_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, vocab_size: int, name: str = "chat_template"
) -> list[str]:
    """Give `tokenizer` the template, the end token that closes a conversation in it, and a padding token.

    The padding token differs from the end tokens where the vocabulary has a token to spare (`vocab_size` is the number
    of rows of the model's embedding). Otherwise code that masks padding by its token would teach a model never to stop.
    Here the loss follows the masks alone. Returns all tokens that end an answer. Raises StageError when the template
    ends answers with no single special token; `name` is what messages call it.
    """
    tokenizer.chat_template = template
    ends = Chat.of(tokenizer, name).end_tokens()
    tokenizer.eos_token = ends[0]
    ids = set(tokenizer.convert_tokens_to_ids(ends))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ids:
        return ends
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    spare = [tokenizer.unk_token_id, *sorted(special - {tokenizer.bos_token_id}), tokenizer.bos_token_id]
    other = next((token for token in spare if token in special and token not in ids), None)
    if other is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    elif len(tokenizer) < vocab_size:  # a row of the embedding that no token uses: untrained, and never read
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        tokenizer.pad_token = tokenizer.eos_token
    return ends


def take_late_system(chat: Chat, conversations: pd.DataFrame) -> tuple[pd.DataFrame, list[str], int]:
    """The conversations without those that the template refuses only for a system message after other turns.

    Second, why each of these is left out: its row, its tree and the reason. Third, how many supervised tokens they
    have without that system message.
    """
    takes, reasons, lost = [], [], 0
    for row in conversations.itertuples():
        others = [message for i, message in enumerate(row.messages) if not i or message["role"] != "system"]
        is_late = len(others) < len(row.messages)
        reason = chat.why_not(list(row.messages)) if is_late else None
        if reason and chat.why_not(others):  # refused without it, too: an error
            reason = None
        takes.append(reason is None)
        if reason:
            reasons.append(f"{reason} (conversation {row.Index}, of tree {row.message_tree_id})")
            lost += wanted_tokens(next(iter(chat.encode([others]))), row.trained)
    return conversations[takes], reasons, lost


def wanted_tokens(encoded: Encoded, trained: Sequence[bool]) -> int:
    """How many tokens the answers have that are to be trained on."""
    return sum(stop - start for (start, stop), wanted in zip(encoded.spans, trained, strict=True) if wanted)


def encode(chat: Chat, conversations: pd.DataFrame) -> Iterator[tuple[Any, Encoded]]:
    """Each row of a table and its conversation in tokens. Raises StageError that names a row that cannot be aligned."""
    talks = [list(messages) for messages in conversations["messages"]]
    try:
        for row, encoded in zip(conversations.itertuples(), chat.stream(talks), strict=True):
            if len(encoded.spans) != len(row.trained):
                raise StageError(
                    f"{PREPARED}: conversation {row.Index} has {len(encoded.spans)} answers, but says of "
                    f"{len(row.trained)} whether to train on them. Delete {PREPARED} and run `dvc repro`."
                )
            yield row, encoded
    except ChatError as error:
        row = conversations.iloc[error.row or 0]
        raise StageError(f"{error} (conversation {row.name}, of tree {row['message_tree_id']})") from None


def tokenize(
    conversations: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str = "chat_template",
    truncation_side: str = "right",
    late: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Conversations (columns messages, trained, lang, message_tree_id) to tokens, and the counts of what was kept.

    `late`: the supervised tokens of the conversations that `take_late_system` left out, which count as lost. Returns
    columns input_ids, assistant_masks (arrays of integers), length, lang, message_tree_id, answers_cut_off.
    Its index says which of the conversations a row is; those of which nothing is left are missing.
    """
    rows, kept, escaped, answers, wanted, lost = [], [], 0, 0, 0, {"too_long": 0, "answers_cut_off": 0}
    chat = Chat.of(tokenizer, name)
    for row, encoded in encode(chat, conversations):
        wanted += wanted_tokens(encoded, row.trained)
        cut = cut_conversation(chat, (row.messages, row.trained), encoded, max_length, truncation_side)
        if cut is None:
            lost["too_long"] += 1
            continue
        escaped += encoded.escaped
        lost["answers_cut_off"] += cut.lost
        answers += cut.trained
        kept.append(row.Index)
        # As arrays they take a fifth of the memory, and Python's garbage collector does not walk through them.
        ids = np.array(cut.ids)
        rows.append((ids, cut.mask, len(ids), row.lang, row.message_tree_id, cut.lost))
    columns = ["input_ids", "assistant_masks", "length", "lang", "message_tree_id", "answers_cut_off"]
    frame = pd.DataFrame(rows, columns=columns, index=pd.Index(kept, dtype=conversations.index.dtype))
    counts = count_tokens(frame)
    unseen = max(0, wanted - counts["supervised_tokens"]) + late
    more = {
        "supervised_tokens_lost": unseen,
        "supervised_tokens_lost_late_system": late,
        "supervised_share_lost": round(unseen / (wanted + late), 4) if wanted + late else 0.0,
        "supervised_answers": answers,
        "control_tokens_escaped": escaped,
    }
    return frame, {**counts, **more, "dropped": lost}


def count_tokens(frame: pd.DataFrame) -> dict[str, Any]:
    """Conversations, tokens, supervised tokens and percentiles of the length (tokens) of a tokenised split."""
    percentiles = frame["length"].quantile([0.05, 0.5, 0.95, 1.0]) if len(frame) else pd.Series(dtype=float)
    return {
        "conversations": len(frame),
        "tokens": int(frame["length"].sum()),
        "supervised_tokens": supervised_tokens(frame),
        "length_percentiles": {f"p{round(q * 100)}": int(v) for q, v in percentiles.items()},
    }


def tokens_table(counts: dict[str, Any], read: dict[str, int]) -> list[str]:
    """The lines of the table of what became of each split; `read` is how many conversations it had."""
    splits = [(counts[split], read[split]) for split in SPLITS]
    reasons = [reason for reason in splits[0][0]["dropped"] if reason != "answers_cut_off"]
    rows: list[list[object]] = [["", *SPLITS], ["conversations read", *(number for _, number in splits)]]
    rows += [[f"left out: {reason}", *(split["dropped"][reason] for split, _ in splits)] for reason in reasons]
    for words, key in (
        ("conversations kept", "conversations"),
        ("tokens", "tokens"),
        ("supervised tokens", "supervised_tokens"),
        ("supervised tokens lost", "supervised_tokens_lost"),
    ):
        rows.append([words, *(split[key] for split, _ in splits)])
    rows.append(["share of them lost", *(f"{split['supervised_share_lost']:.1%}" for split, _ in splits)])
    rows.append(["answers cut off", *(split["dropped"]["answers_cut_off"] for split, _ in splits)])
    return aligned(rows, "tokenize")


def warnings_of(split: str, counts: dict[str, Any], read: int) -> list[str]:
    """What a user should know of a split, one line each."""
    lines = []
    if escaped := counts["control_tokens_escaped"]:
        lines.append(
            f"tokenize: {split}: {escaped} conversations spell control tokens; an invisible space was put inside each, "
            "as the chat app does"
        )
    for reason, number in counts["dropped"].items():
        if reason in PARAMETERS and is_much(number, read):
            lines.append(
                left_out_warning("tokenize", f"{split}: {reason}", number, read, PARAMETERS[reason], "conversations")
            )
    lost = counts["supervised_tokens_lost"] - counts["supervised_tokens_lost_late_system"]
    wanted = counts["supervised_tokens_lost"] + counts["supervised_tokens"]
    if is_much(lost, wanted):
        lines.append(
            left_out_warning("tokenize", f"{split}: max_length", lost, wanted, "max_length", "supervised tokens")
        )
    return lines


def load_chat(params: TokenizeParams) -> tuple[PreTrainedTokenizerBase, Chat, list[str]]:
    """The base model's tokenizer with the chosen template and special tokens, both as a Chat, and the tokens that end
    an answer. Raises StageError when they do not fit each other or the parameters."""
    config = load_config(BASE)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and params.max_length > longest:
        raise StageError(
            f"max_length: {params.max_length}: the base model reads at most {longest} tokens. Set it lower."
        )
    tokenizer = load_tokenizer(BASE)
    if not tokenizer.is_fast:
        raise StageError(
            f"{BASE} has no fast tokenizer (tokenizer.json), needed to find the assistant's tokens. "
            "Choose a base_model that has one."
        )
    name = f"chat_template: {params.chat_template}"
    ends = set_special_tokens(tokenizer, load_template(params.chat_template, tokenizer), config.vocab_size, name)
    if len(tokenizer) > config.vocab_size:
        raise StageError(
            f"{BASE}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: they do not fit. "
            "Choose a base_model whose files belong together."
        )
    chat = Chat.of(tokenizer, name)
    check_same_ids(chat, rendered_by(tokenizer), "transformers")
    return tokenizer, chat, ends


def print_notes(chat: Chat) -> None:
    """Print what a user should know of the template; on stderr where a prompt differs from what is trained on."""
    for note in chat.notes():
        print(f"tokenize: {note}", flush=True)
    for warning in chat.warnings():
        print(f"warning: tokenize: {warning}", file=sys.stderr, flush=True)


def main() -> None:
    params = load_params(TokenizeParams)
    tokenizer, chat, ends = load_chat(params)
    print_notes(chat)

    prepared = read_json(PREPARED / "params.json", ["system_prompt"])
    counts: dict[str, Any] = {}
    read: dict[str, int] = {}
    shown: list[Shown] = []
    with write_whole(PAGE) as page, write_whole(TOKENS) as report, write_whole(TOKENIZED) as folder:
        folder.mkdir()
        for split in SPLITS:
            conversations = read_parquet(PREPARED / f"{split}.parquet", COLUMNS)
            read[split] = len(conversations)
            conversations, refused, late = take_late_system(chat, conversations)
            if refused:
                print(f"tokenize: {split}: {len(refused)} conversations are left out (late_system): {refused[0]}")
            frame, counts[split] = tokenize(
                conversations, tokenizer, params.max_length, chat.name, params.truncation_side, late
            )
            counts[split]["dropped"]["late_system"] = len(refused)
            if frame.empty and refused:
                raise StageError(f"no conversation of {split} is left. {refused[0]}")
            if frame.empty:
                raise StageError(
                    f"no conversation of {split} fits into max_length, {params.max_length} tokens. Raise it."
                )
            frame.to_parquet(folder / f"{split}.parquet", index=False)
            shown += show_sample(chat, tokenizer, (conversations, frame), split, params)
        tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "params.json", {**prepared, **params.model_dump()})
        write_json(report, {**counts, "end_tokens": ends})
        write_text(page, token_page(shown, counts, ends))
    print("\n".join(tokens_table(counts, read)), flush=True)
    for split in SPLITS:
        for line in warnings_of(split, counts[split], read[split]):
            print(line, file=sys.stderr, flush=True)

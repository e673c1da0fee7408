"""Turn conversations into tokens by a chat template, and mark which tokens are the assistant's.

Reads data/prepared/ and the tokenizer of models/base/.
Writes data/tokenized/{train,validation}.parquet (input_ids, assistant_masks, length), data/tokenized/tokenizer/ (the
base model's tokenizer with the chosen template, end and padding token), data/tokenized/params.json (how the data were
made so far) and reports/tokens.json (counts, and the tokens that end answers).
Run: `dvc repro tokenize`
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from stages.common.artifacts import read_json, read_parquet, write_json, write_whole
from stages.common.chat import Chat, ChatError, Encoded, check_same_ids, has_marks, rendered_by
from stages.common.errors import StageError
from stages.common.masks import supervised_tokens
from stages.common.model_files import load_config, load_tokenizer
from stages.common.params import TEMPLATES, load_params
from stages.common.schema import TokenizeParams

BASE = Path("models/base")
PREPARED = Path("data/prepared")
TOKENIZED = Path("data/tokenized")
TOKENS = Path("reports/tokens.json")

SPLITS = ("train", "validation")
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


def cut_to_turns(encoded: Encoded, trained: Sequence[bool], max_length: int) -> tuple[list[int], list[int], int] | None:
    """A conversation up to the last complete answer within `max_length` tokens.

    Returns its ids, its mask (1 on the tokens of the answers that are to be trained on) and how many answers it lost;
    None when no answer to train on fits.
    """
    kept = [span for span in encoded.spans if span[1] <= max_length]
    if not any(trained[: len(kept)]):
        return None
    end = kept[-1][1]
    mask = [0] * end
    for (start, stop), wanted in zip(kept, trained, strict=False):
        if wanted:
            mask[start:stop] = [1] * (stop - start)
    return encoded.ids[:end], mask, len(encoded.spans) - len(kept)


def take_late_system(chat: Chat, conversations: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The conversations without those that the template refuses only for a system message after other turns.

    Second, why each of these is left out: its row, its tree and the reason.
    """
    takes, reasons = [], []
    for row in conversations.itertuples():
        others = [message for i, message in enumerate(row.messages) if not i or message["role"] != "system"]
        is_late = len(others) < len(row.messages)
        reason = chat.why_not(list(row.messages)) if is_late else None
        if reason and chat.why_not(others):  # refused without it, too: an error
            reason = None
        takes.append(reason is None)
        if reason:
            reasons.append(f"{reason} (conversation {row.Index}, of tree {row.message_tree_id})")
    return conversations[takes], reasons


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
    conversations: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "chat_template"
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Conversations (columns messages, trained, lang, message_tree_id) to tokens, and the counts of what was kept.

    Returns columns input_ids, assistant_masks (arrays of integers), length, lang, message_tree_id.
    """
    rows, escaped, lost = [], 0, {"first_answer_beyond_max_length": 0, "answers_cut_off": 0}
    for row, encoded in encode(Chat.of(tokenizer, name), conversations):
        cut = cut_to_turns(encoded, row.trained, max_length)
        if cut is None:
            lost["first_answer_beyond_max_length"] += 1
            continue
        ids, mask, lost_answers = cut
        escaped += encoded.escaped
        lost["answers_cut_off"] += lost_answers
        # As arrays they take a fifth of the memory, and Python's garbage collector does not walk through them.
        rows.append((np.array(ids), np.array(mask), len(ids), row.lang, row.message_tree_id))
    frame = pd.DataFrame(rows, columns=["input_ids", "assistant_masks", "length", "lang", "message_tree_id"])
    return frame, {**count_tokens(frame), "control_tokens_escaped": escaped, "dropped": lost}


def count_tokens(frame: pd.DataFrame) -> dict[str, Any]:
    """Conversations, tokens, supervised tokens and percentiles of the length (tokens) of a tokenised split."""
    percentiles = frame["length"].quantile([0.05, 0.5, 0.95, 1.0]) if len(frame) else pd.Series(dtype=float)
    return {
        "conversations": len(frame),
        "tokens": int(frame["length"].sum()),
        "supervised_tokens": supervised_tokens(frame),
        "length_percentiles": {f"p{round(q * 100)}": int(v) for q, v in percentiles.items()},
    }


def report_split(split: str, counts: dict[str, Any]) -> None:
    """Print what became of a split, in one or two lines."""
    print(f"tokenize: {split}: {counts['conversations']} conversations, {counts['tokens']} tokens")
    if escaped := counts["control_tokens_escaped"]:
        print(
            f"tokenize: {split}: {escaped} conversations spell control tokens; an invisible space was put inside each, "
            "as the chat app does"
        )


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


def main() -> None:
    params = load_params(TokenizeParams)
    tokenizer, chat, ends = load_chat(params)
    for note in chat.notes():
        print(f"tokenize: {note}")

    prepared = read_json(PREPARED / "params.json", ["system_prompt"])
    counts: dict[str, Any] = {}
    with write_whole(TOKENS) as report, write_whole(TOKENIZED) as folder:
        folder.mkdir()
        for split in SPLITS:
            conversations = read_parquet(PREPARED / f"{split}.parquet", COLUMNS)
            conversations, refused = take_late_system(chat, conversations)
            if refused:
                print(f"tokenize: {split}: {len(refused)} conversations are left out (late_system): {refused[0]}")
            frame, counts[split] = tokenize(conversations, tokenizer, params.max_length, chat.name)
            counts[split]["dropped"]["late_system"] = len(refused)
            if frame.empty and refused:
                raise StageError(f"no conversation of {split} is left. {refused[0]}")
            if frame.empty:
                raise StageError(
                    f"no conversation of {split} fits into max_length, {params.max_length} tokens. Raise it."
                )
            frame.to_parquet(folder / f"{split}.parquet", index=False)
            report_split(split, counts[split])
        tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "params.json", {**prepared, **params.model_dump()})
        write_json(report, {**counts, "end_tokens": ends})

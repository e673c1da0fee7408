"""Turn conversations into tokens by a chat template, and mark which tokens are the assistant's.

Reads data/prepared/ and the tokenizer of models/base/.
Writes data/tokenized/{train,validation}.parquet (input_ids, assistant_masks, length), data/tokenized/tokenizer/ (the
base model's tokenizer with the chosen template, end and padding token), data/tokenized/params.json (how the data were
made so far) and reports/tokens.json (counts).
Run: `dvc repro tokenize`
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from stages.common.artifacts import read_json, read_parquet, write_json, write_whole
from stages.common.errors import StageError
from stages.common.masks import answer_spans, supervised_tokens
from stages.common.model_files import load_config, load_tokenizer
from stages.common.params import TEMPLATES, load_params
from stages.common.schema import TokenizeParams

BASE = Path("models/base")
PREPARED = Path("data/prepared")
TOKENIZED = Path("data/tokenized")
TOKENS = Path("reports/tokens.json")

SPLITS = ("train", "validation")
COLUMNS = ("messages", "trained", "lang", "message_tree_id")  # what is read of a conversation
BATCH = 512  # conversations tokenised at once: enough for the fast tokenizer's threads, little memory


def has_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's text."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of a chat template, with its {% generation %} marks.

    `name` is a file of stages/templates/ without its ending, or `model` for the tokenizer's own, to which TRL adds the
    marks for the model families it knows. Raises StageError when there is none or it has no marks.
    """
    if name == "model":
        if tokenizer.chat_template is None:
            raise StageError("chat_template: model: the base model has no chat template; use chatml or phi2.")
        if has_marks(tokenizer.chat_template):
            return str(tokenizer.chat_template)
        try:
            return str(get_training_chat_template(tokenizer))
        except ValueError:
            raise StageError(
                "chat_template: model: the base model's template does not mark the assistant's text with "
                f"{{% generation %}}. Copy it to {TEMPLATES}/NAME.jinja, add the marks, and set chat_template: NAME."
            ) from None
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise StageError(f"chat_template: {path} does not exist. Set it to one of: {names}, model.")
    template = path.read_text(encoding="utf-8")
    if not has_marks(template):
        raise StageError(
            f"chat_template: {path} has no {{% generation %}} marks around the assistant's text. Put them in."
        )
    return template


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, template: str, vocab_size: int) -> None:
    """Give `tokenizer` the template, the end token that closes an answer in it, and a padding token.

    The padding token differs from the end token where the vocabulary has a token to spare (`vocab_size` is the number
    of rows of the model's embedding). Otherwise code that masks padding by its token would teach a model never to stop.
    Here the loss follows the masks alone. Raises StageError when the template ends answers with no special token.
    """
    tokenizer.chat_template = template
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids, mask = _apply(tokenizer, [probe])[0]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    spans = answer_spans(mask)
    if not spans:
        raise StageError(
            "chat_template: the template marks no assistant text. Put {% generation %} marks around each answer."
        )
    answer = ids[slice(*spans[-1])]
    ends = [token for token in answer if token in special]
    if not ends:
        raise StageError(
            f"chat_template: in it an answer ends with {tokenizer.decode(answer[-1])!r}, which is no special token of "
            "the base model, so the model could not learn to stop. Choose a template that fits the model."
        )
    end = ends[-1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return
    spare = [tokenizer.unk_token_id, *sorted(special - {tokenizer.bos_token_id}), tokenizer.bos_token_id]
    other = next((token for token in spare if token in special and token != end), None)
    if other is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    elif len(tokenizer) < vocab_size:  # a row of the embedding that no token uses: untrained, and never read
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        tokenizer.pad_token = tokenizer.eos_token


def _apply(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]]
) -> list[tuple[list[int], list[int]]]:
    """Ids and assistant mask of each conversation, exactly as the template marks them."""
    encoded = tokenizer.apply_chat_template(list(conversations), return_dict=True, return_assistant_tokens_mask=True)
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]]
) -> list[tuple[list[int], list[int]]]:
    """Token ids and assistant mask of each conversation: 1 on each answer's tokens up to its end token, 0 elsewhere."""
    encoded = []
    for ids, marked in _apply(tokenizer, conversations):
        mask = list(marked)
        for start, stop in answer_spans(marked):
            # Some templates also mark the line break after the end token.
            while stop > start + 1 and ids[stop - 1] != tokenizer.eos_token_id:
                stop -= 1
                mask[stop] = 0
        encoded.append((list(ids), mask))
    return encoded


def cut_to_turns(
    ids: list[int], mask: list[int], trained: Sequence[bool], max_length: int
) -> tuple[list[int], list[int], int] | None:
    """A conversation up to the last complete answer within `max_length` tokens.

    Returns its ids, its mask (zero on the answers that are not to be trained on) and how many answers it lost; None
    when no answer to train on fits.
    """
    spans = answer_spans(mask)
    kept = [span for span in spans if span[1] <= max_length]
    if not any(trained[: len(kept)]):
        return None
    end = kept[-1][1]
    supervised = [0] * end
    for (start, stop), wanted in zip(kept, trained, strict=False):
        if wanted:
            supervised[start:stop] = [1] * (stop - start)
    return ids[:end], supervised, len(spans) - len(kept)


def tokenize(
    conversations: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Conversations (columns messages, trained, lang, message_tree_id) to tokens, and the counts of what was kept.

    Returns columns input_ids, assistant_masks (lists of ints), length, lang, message_tree_id.
    """
    reserved = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    rows, lost = [], {"control_tokens_in_text": 0, "first_answer_beyond_max_length": 0, "answers_cut_off": 0}
    for start in range(0, len(conversations), BATCH):
        batch = conversations.iloc[start : start + BATCH]
        messages = [[dict(message) for message in row] for row in batch["messages"]]
        for row, content, (ids, mask) in zip(batch.itertuples(), messages, encode(tokenizer, messages), strict=True):
            # Text that spells a control token would end or begin a turn where there is none.
            if any(token in message["content"] for message in content for token in reserved):
                lost["control_tokens_in_text"] += 1
                continue
            cut = cut_to_turns(ids, mask, list(row.trained), max_length)
            if cut is None:
                lost["first_answer_beyond_max_length"] += 1
                continue
            lost["answers_cut_off"] += cut[2]
            rows.append((cut[0], cut[1], len(cut[0]), row.lang, row.message_tree_id))
    frame = pd.DataFrame(rows, columns=["input_ids", "assistant_masks", "length", "lang", "message_tree_id"])
    return frame, {**count_tokens(frame), "dropped": lost}


def count_tokens(frame: pd.DataFrame) -> dict[str, Any]:
    """Conversations, tokens, supervised tokens and percentiles of the length (tokens) of a tokenised split."""
    percentiles = frame["length"].quantile([0.05, 0.5, 0.95, 1.0]) if len(frame) else pd.Series(dtype=float)
    return {
        "conversations": len(frame),
        "tokens": int(frame["length"].sum()),
        "supervised_tokens": supervised_tokens(frame),
        "length_percentiles": {f"p{round(q * 100)}": int(v) for q, v in percentiles.items()},
    }


def main() -> None:
    params = load_params(TokenizeParams)
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
    set_special_tokens(tokenizer, load_template(params.chat_template, tokenizer), config.vocab_size)
    if len(tokenizer) > config.vocab_size:
        raise StageError(
            f"{BASE}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: they do not fit. "
            "Choose a base_model whose files belong together."
        )

    prepared = read_json(PREPARED / "params.json", ["system_prompt"])
    counts = {}
    with write_whole(TOKENS) as report, write_whole(TOKENIZED) as folder:
        folder.mkdir()
        for split in SPLITS:
            conversations = read_parquet(PREPARED / f"{split}.parquet", COLUMNS)
            frame, counts[split] = tokenize(conversations, tokenizer, params.max_length)
            if frame.empty:
                raise StageError(
                    f"no conversation of {split} fits into max_length, {params.max_length} tokens. Raise it."
                )
            frame.to_parquet(folder / f"{split}.parquet", index=False)
            print(
                f"tokenize: {split}: {counts[split]['conversations']} conversations, {counts[split]['tokens']} tokens"
            )
        tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "params.json", {**prepared, **params.model_dump()})
        write_json(report, counts)

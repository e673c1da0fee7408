"""The held-out loss, in one definition for training's curve, evaluation and export: over supervised tokens only."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from stages.common.errors import StageError
from stages.common.masks import UNSUPERVISED, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loss_of(scores: pd.DataFrame) -> float:
    """Mean negative log-likelihood of all scored tokens, in nats a token; `scores` as `score` returns them."""
    return float(scores["nll"].sum() / scores["tokens"].sum())


def perplexity_of(scores: pd.DataFrame) -> float:
    """The exponential of the loss."""
    return float(np.exp(loss_of(scores)))


def accuracy_of(scores: pd.DataFrame) -> float:
    """The share of scored tokens that are the model's first choice."""
    return float(scores["correct"].sum() / scores["tokens"].sum())


def score(
    model: "PreTrainedModel",
    rows: pd.DataFrame,
    batch_size: int,
    pad_token_id: int,
    on_batch: Callable[[int], object] = lambda conversations: None,
) -> pd.DataFrame:
    """Score each conversation of `rows` (columns input_ids, assistant_masks, length), in the order of `rows`.

    Returns columns nll (sum of negative log-likelihoods of the supervised tokens, in nats), tokens (their number) and
    correct (how many are the model's first choice). Conversations of similar length share a batch; `on_batch` gets the
    size of each batch.
    Raises StageError when a loss is not finite.
    """
    order = rows["length"].argsort(kind="stable").to_list()
    results: dict[int, tuple[float, int, int]] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, attention, labels = _pad(rows.iloc[batch], pad_token_id, model.device)
            # Only positions before a supervised token in some conversation need logits.
            positions = (labels[:, 1:] != UNSUPERVISED).any(dim=0).nonzero().squeeze(1)
            with torch.no_grad():
                logits = model(
                    input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=positions
                ).logits
            targets = labels[:, 1:][:, positions]
            supervised = targets != UNSUPERVISED
            logits, targets = logits[supervised].float(), targets[supervised]
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
            correct = logits.argmax(dim=-1) == targets
            if not torch.isfinite(nll).all():
                raise StageError("the model's loss is not finite in this number format. Use bfloat16 or float32.")
            counts = supervised.sum(dim=1).tolist()
            for index, each, right in zip(batch, nll.split(counts), correct.split(counts), strict=True):
                results[index] = (each.sum().item(), len(each), int(right.sum()))
            on_batch(len(batch))
    finally:
        model.train(was_training)
    return pd.DataFrame([results[i] for i in range(len(rows))], columns=["nll", "tokens", "correct"])


def _pad(rows: pd.DataFrame, pad_token_id: int, device: object) -> tuple:
    """Right-padded ids, attention mask and labels, each of shape (conversations, longest)."""
    ids = [torch.as_tensor(list(x)) for x in rows["input_ids"]]
    pairs = zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    labels = [torch.as_tensor(labels_of(x, mask)) for x, mask in pairs]
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(ids, batch_first=True, padding_value=pad_token_id).to(device),
        pad([torch.ones_like(x) for x in ids], batch_first=True).to(device),
        pad(labels, batch_first=True, padding_value=UNSUPERVISED).to(device),
    )

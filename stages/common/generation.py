"""Greedy answers of a transformers model: the same settings wherever answers are compared."""

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from stages.common.chat import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def greedy_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """The token ids of the greedy answer to each prompt, with its end token where it ends within `max_new_tokens`.

    Any token that ends an answer in the chat template ends it. `repetition_penalty` lowers what the answer said
    before (Keskar et al., CTRL, 2019, section 4.1, https://arxiv.org/abs/1909.05858). The prompt does not count: it has
    the very token that should end the answer.
    """
    ends = end_ids(tokenizer)
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        said = _answer_batch(model, [prompts[i] for i in batch], ends, max_new_tokens, repetition_penalty)
        answers.update(zip(batch, said, strict=True))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def _answer_batch(
    model: "PreTrainedModel", prompts: list[list[int]], ends: list[int], max_new_tokens: int, penalty: float
) -> list[list[int]]:
    """The answers to prompts that are padded on the left. A row leaves the batch when its answer ends; transformers'
    `generate` computes it until the last one ends.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    attention = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(ids)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    said = torch.zeros(len(prompts), model.get_output_embeddings().weight.shape[0], dtype=torch.bool).to(model.device)
    cache = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # whose answers have not ended
    for _ in range(max_new_tokens):
        output = model(input_ids=ids, attention_mask=attention, position_ids=positions, cache=cache, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        tokens = torch.where(said, lowered, logits).argmax(-1)
        said.scatter_(1, tokens[:, None], True)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        if (going := [at for at, row in enumerate(rows) if answers[row][-1] not in ends]) != list(range(len(rows))):
            kept = torch.tensor(going, dtype=torch.long, device=model.device)
            rows = [rows[at] for at in going]
            tokens, attention, positions, said = tokens[kept], attention[kept], positions[kept], said[kept]
            cache.batch_select_indices(kept)
        if not rows:
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
    return answers

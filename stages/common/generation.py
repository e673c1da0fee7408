"""Greedy answers of a transformers model: the same settings wherever answers are compared."""

from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

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
    # All models decode in the same way: a base model's own settings do not count.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(prompts[batch[-1]])
        padding = [longest - len(prompts[i]) for i in batch]
        ids = [[tokenizer.pad_token_id] * n + prompts[i] for n, i in zip(padding, batch, strict=True)]
        attention = [[0] * n + [1] * (longest - n) for n in padding]
        penalty = RepetitionPenaltyLogitsProcessor(repetition_penalty, prompt_ignore_length=longest)
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(attention, device=model.device),
                logits_processor=LogitsProcessorList([penalty]),
            )
        for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            answers[i] = row[: end + 1]
    return [answers[i] for i in range(len(prompts))]

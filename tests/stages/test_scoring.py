"""Masks, losses and greedy answers: what several stages compute, each against a calculation by hand."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from stages.common.errors import StageError
from stages.common.generation import greedy_answers
from stages.common.masks import UNSUPERVISED, labels_of, question_of, supervised_tokens
from stages.common.models import load_model
from stages.common.scoring import accuracy_of, loss_of, perplexity_of, score
from stages.common.trainer import to_dataset
from tests.support.training import tokenizer_of, tokens

ROW = pd.DataFrame({"input_ids": [[5, 6, 7, 8, 9]], "assistant_masks": [[0, 0, 1, 1, 0]], "length": [5]})


def test_labels_are_the_ids_of_supervised_tokens():
    assert labels_of([5, 6, 7], [0, 1, 1]) == [UNSUPERVISED, 6, 7] == [-100, 6, 7]
    with pytest.raises(ValueError):  # a mask of another length
        labels_of([5, 6, 7], [0, 1])
    assert list(to_dataset(ROW))[0] == {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100], "length": 5}


def test_the_question_ends_where_the_first_answer_begins():
    assert question_of(ROW.iloc[0]) == [5, 6]


def test_supervised_tokens_are_counted_over_all_conversations():
    assert supervised_tokens(ROW) == 2
    assert supervised_tokens(pd.concat([ROW, ROW])) == 4
    assert supervised_tokens(ROW.head(0)) == 0


def test_loss_perplexity_and_accuracy_weigh_tokens_not_conversations():
    scores = pd.DataFrame({"nll": [10.0, 2.0], "tokens": [4, 2], "correct": [1, 2]})
    assert loss_of(scores) == 2.0
    assert perplexity_of(scores) == pytest.approx(math.exp(2.0))
    assert accuracy_of(scores) == 0.5


def test_score_is_the_loss_of_each_conversation_alone(tiny_llama):
    rows, tokenizer = tokens(tiny_llama, "chatml")
    model, sizes = load_model(tiny_llama, torch.float32), []
    scores = score(model, rows, 5, tokenizer.pad_token_id, sizes.append)
    assert sizes == [5, 5, 2]  # what the progress bar gets
    for row, nll, count, correct in zip(
        to_dataset(rows), scores["nll"], scores["tokens"], scores["correct"], strict=True
    ):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        assert count == (labels != -100).sum()
        assert nll / count == pytest.approx(output.loss.item(), abs=1e-5)
        best = output.logits[0, :-1].argmax(dim=-1)
        assert correct == (best == labels[0, 1:]).sum()


def test_a_large_vocabulary_costs_no_digits():
    """float32 sums over 50,000 tokens lose digits where they run along a stride."""
    tokens, vocabulary = 40, 50_000
    logits = torch.randn(2, tokens, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.arange(2 * tokens).reshape(2, tokens)

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, logits_to_keep: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=logits[:, logits_to_keep])

    masks = [[0] + [1] * (tokens - 1)] * 2
    rows = pd.DataFrame({"input_ids": ids.tolist(), "assistant_masks": masks, "length": [tokens] * 2})
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    assert loss_of(score(Model(), rows, 2, 0)) == pytest.approx(expected.item(), rel=2e-7)


def test_scoring_leaves_the_model_as_it_was_and_refuses_an_infinite_loss(tiny_llama):
    rows, tokenizer = tokens(tiny_llama, "chatml", 2)
    model = load_model(tiny_llama, torch.float32)
    for training in (True, False):
        model.train(training)
        score(model, rows, 2, tokenizer.pad_token_id)
        assert model.training is training
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    model.train()
    with pytest.raises(StageError, match="loss is not finite"):
        score(model, rows, 2, tokenizer.pad_token_id)
    assert model.training


@pytest.mark.parametrize("name, template", [("tiny_llama", "chatml"), ("tiny_phi", "phi2")])
def test_answers_are_greedy_whatever_they_are_batched_with(name, template, request):
    folder = request.getfixturevalue(name)
    tokenizer = tokenizer_of(folder, template)
    model = load_model(folder, torch.float32).eval()
    # A base model's own settings do not count.
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    texts = ("?", "How do I boil an egg so that the yolk stays soft?")
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for t in texts
    ]
    penalised = greedy_answers(model, tokenizer, prompts, 6, 8, repetition_penalty=20.0)
    assert penalised == [greedy_answers(model, tokenizer, [prompt], 6, 8, 20.0)[0] for prompt in prompts]
    together = greedy_answers(model, tokenizer, prompts, 6, 8)
    assert penalised != together
    assert together == [greedy_answers(model, tokenizer, [prompt], 6, 8)[0] for prompt in prompts]
    assert together[::-1] == greedy_answers(model, tokenizer, prompts[::-1], 6, 1)
    # By hand: at each step the most likely token, up to the end token or six tokens.
    for prompt, answer in zip(prompts, together, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and tokenizer.eos_token_id not in expected:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + expected])).logits[0, -1]
            expected.append(logits.argmax().item())
        assert answer == expected


def test_an_answer_ends_with_its_end_token_and_no_padding(tiny_llama):
    """A short answer beside a long one is padded by generate(); greedy_answers cuts that."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = load_model(tiny_llama, torch.float32).eval()
    free = greedy_answers(model, tokenizer, [[20], [40, 41]], 8, 2)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[0][2])  # its third token is the end now
    tokenizer.pad_token = "<|endoftext|>"
    short, other = greedy_answers(model, tokenizer, [[20], [40, 41]], 8, 2)
    first = free[0].index(free[0][2]) + 1
    assert short == free[0][:first]
    assert len(short) < 8 and len(other) <= 8

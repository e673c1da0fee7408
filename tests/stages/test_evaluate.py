"""The comparison: figures worked by hand, an interval that covers the truth, readable samples."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from commands.summary import one_sample, table
from stages.common import models
from stages.common.artifacts import read_json
from stages.evaluate import answer, compare, paired_difference, question_of, samples_page, summarise
from stages.tokenize import load_template, set_special_tokens
from tests.support.project import ROOT, ships


def scores(nll, tokens, correct):
    return pd.DataFrame({"nll": nll, "tokens": tokens, "correct": correct})


def test_summary_weighs_tokens_not_conversations():
    summary = summarise(scores([10.0, 2.0], [4, 2], [1, 2]))
    assert summary == {"loss": 2.0, "perplexity": round(np.exp(2.0), 4), "token_accuracy": 0.5}


def test_paired_difference_by_hand():
    base, tuned = scores([10.0, 2.0], [4, 2], [1, 2]), scores([7.0, 2.0], [4, 2], [1, 2])
    result = paired_difference(base, tuned, 1000, 0)
    assert result["loss"] == -0.5
    # Resampling two conversations gives both (-0.5), twice the first (-0.75) or twice the second (0).
    assert result["loss_ci95_low"] == -0.75 and result["loss_ci95_high"] == 0.0
    assert result["perplexity_ratio"] == round(float(np.exp(-0.5)), 6)
    assert not result["significant"]


def test_equal_models_show_no_difference_and_a_clear_one_does():
    random = np.random.default_rng(0)
    base = scores(random.normal(100, 10, 40), [50] * 40, [20] * 40)
    noise = scores(base["nll"] + random.normal(0, 5, 40), [50] * 40, [20] * 40)
    better = scores(base["nll"] - 5 + random.normal(0, 5, 40), [50] * 40, [20] * 40)
    assert paired_difference(base, base, 500, 0)["loss"] == 0
    assert not paired_difference(base, noise, 500, 0)["significant"]
    assert paired_difference(base, better, 500, 0)["significant"]
    assert paired_difference(base, better, 500, 0) == paired_difference(base, better, 500, 0)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        gain = random.normal(-0.1, 0.5, 40)
        base = scores(np.zeros(40), [1] * 40, [0] * 40)
        result = paired_difference(base, scores(gain, [1] * 40, [0] * 40), 400, seed)
        hits += result["loss_ci95_low"] <= -0.1 <= result["loss_ci95_high"]
    assert 175 <= hits <= 200


def test_languages_with_enough_conversations_are_told_apart():
    base = scores([10.0] * 15, [5] * 15, [1] * 15)
    tuned = scores([5.0] * 10 + [10.0] * 5, [5] * 15, [1] * 15)
    metrics = compare({"base": base, "tuned": tuned}, pd.Series(["en"] * 10 + ["de"] * 5), 200, 0)
    assert list(metrics["by_language"]) == ["en"]
    assert metrics["by_language"]["en"]["difference"]["loss"] == -1.0
    assert metrics["held_out"] == {"conversations": 15, "supervised_tokens": 75}


@pytest.mark.parametrize("name, template", [("tiny_llama", "chatml"), ("tiny_phi", "phi2")])
def test_answers_are_greedy_whatever_they_are_batched_with(name, template, request):
    folder = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_special_tokens(tokenizer, load_template(template, tokenizer), len(tokenizer) + 8)
    model = models.load_model(folder, torch.float32).eval()
    texts = ("?", "How do I boil an egg so that the yolk stays soft?")
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for t in texts
    ]
    together = answer(model, prompts, tokenizer, 6, 8)
    assert together == [answer(model, [prompt], tokenizer, 6, 8)[0] for prompt in prompts]
    assert together[::-1] == answer(model, prompts[::-1], tokenizer, 6, 1)
    # One step by hand: the most likely token after the prompt.
    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    if first != tokenizer.eos_token_id:
        assert together[0][0].startswith(tokenizer.decode([first]).strip())


def test_the_question_ends_where_the_first_answer_begins():
    row = pd.DataFrame({"input_ids": [[5, 6, 7, 8, 9]], "assistant_masks": [[0, 0, 1, 1, 0]]}).iloc[0]
    assert question_of(row) == [5, 6]


def test_samples_page_and_summary_read_well():
    answers = {"base": [("Lyon", False), ("x", True)], "tuned": [("Paris.\n\nIt is.", True), ("y", True)]}
    page = samples_page(["Capital of France?", "Other?"], answers, 8)
    assert "## Capital of France?" in page
    assert "**base**\n\n> Lyon …" in page
    assert "**tuned**\n\n> Paris.\n>\n> It is." in page
    assert one_sample(page) == ["  Capital of France?", "", "  base: Lyon …", "", "  tuned: Paris. It is."]
    answers["tuned"][0] = answers["base"][0]
    assert one_sample(samples_page(["Capital of France?", "Other?"], answers, 8))[0] == "  Other?"


@ships
def test_committed_metrics_show_a_better_model():
    """The figures in git are those of the embedded recipe: tuned better than base, beyond doubt."""
    metrics = read_json(ROOT / "reports/metrics.json")
    assert metrics["difference"]["loss_ci95_high"] < 0
    assert metrics["tuned"]["perplexity"] < metrics["base"]["perplexity"]
    assert "excludes zero" in "\n".join(table(metrics))

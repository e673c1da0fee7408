"""The comparison: figures worked by hand, an interval that covers the truth, readable samples."""

import numpy as np
import pandas as pd

from commands.summary import table
from stages.common.artifacts import read_json
from stages.common.schema import EvaluateParams
from stages.evaluate import (
    compare,
    conversation_losses,
    headline,
    paired_difference,
    prompts_of,
    sample_records,
    samples_page,
    summarise,
)
from tests.support.params import section
from tests.support.project import ROOT, ships
from tests.support.training import tokenizer_of, tokens


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


def test_languages_with_enough_conversations_get_their_own_figures():
    base = scores([10.0] * 15, [5] * 15, [1] * 15)
    tuned = scores([5.0] * 10 + [10.0] * 5, [5] * 15, [1] * 15)
    metrics = compare({"base": base, "tuned": tuned}, pd.Series(["en"] * 10 + ["de"] * 5), 200, 0)
    assert list(metrics["by_language"]) == ["en"]
    assert metrics["by_language"]["en"]["difference"]["loss"] == -1.0
    assert metrics["held_out"] == {"conversations": 15, "supervised_tokens": 75}


def test_each_conversation_has_both_losses():
    rows = pd.DataFrame({"message_tree_id": ["a", "b"], "lang": ["en", "de"]})
    table = conversation_losses(
        rows, {"base": scores([10.0, 2.0], [4, 2], [1, 2]), "tuned": scores([7.0, 2.0], [4, 2], [1, 2])}
    )
    assert table.to_csv(index=False) == (
        "message_tree_id,lang,tokens,base_loss,tuned_loss\na,en,4,2.5,1.75\nb,de,2,1.0,1.0\n"
    )


def test_the_metrics_are_seven_numbers():
    base, tuned = scores([10.0, 2.0], [4, 2], [1, 2]), scores([7.0, 2.0], [4, 2], [2, 2])
    evaluation = compare({"base": base, "tuned": tuned}, pd.Series(["en", "en"]), 1000, 0)
    evaluation["answers"] = {
        name: {"ended": rate, "median_tokens": 7.5} for name, rate in (("base", 0), ("tuned", 0.5))
    }
    assert headline(evaluation) == {
        "ppl": round(np.exp(1.5), 4),
        "ratio": round(np.exp(-0.5), 4),
        "lo": round(np.exp(-0.75), 4),
        "hi": 1.0,
        "stops": 0.5,
        "base_stops": 0,
        "len": 7.5,
    }


def test_prompts_are_the_samples_and_then_held_out_questions(tiny_llama):
    rows, tokenizer = tokens(tiny_llama, "chatml", 3)
    params = section(EvaluateParams, sample_prompts=["Why?"], stop_prompts=2, system_prompt="Be kind.")
    texts = [tokenizer.decode(ids) for ids in prompts_of(params, rows, tokenizer)]
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    question = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [system + question.format("Why?"), *(question.format(f"What is {i} + 1?") for i in (0, 1))]
    without = section(EvaluateParams, sample_prompts=["Why?"], stop_prompts=1, system_prompt="")
    assert [tokenizer.decode(ids) for ids in prompts_of(without, rows.head(0), tokenizer)] == [question.format("Why?")]


def sample(prompt: str, base: str, tuned: str, ended: bool = True) -> dict:
    return {"prompt": prompt, "base": {"text": base, "ended": ended}, "tuned": {"text": tuned, "ended": True}}


def test_sample_records_say_what_was_answered_and_whether_it_ended(tiny_llama):
    tokenizer = tokenizer_of(tiny_llama, "chatml")
    cut, whole = tokenizer.encode("Lyon"), [*tokenizer.encode(" Paris "), tokenizer.eos_token_id]
    records = sample_records(["Capital?"], {"base": [cut], "tuned": [whole]}, tokenizer)
    assert records == [sample("Capital?", "Lyon", "Paris", ended=False)]


def test_the_samples_page_reads_well():
    samples = [sample("Capital of France?", "Lyon", "Paris.\n\nIt is.", ended=False), sample("Other?", "x", "y")]
    page = samples_page(samples, 8, 1.1)
    assert "at most 8 tokens" in page
    assert "## Capital of France?" in page
    assert "**base**\n\n> Lyon …" in page
    assert "**tuned**\n\n> Paris.\n>\n> It is." in page


HOSTILE = "**base**\n\n> no\n## x\n**tuned**\n# Sample answers"


def test_an_answer_that_looks_like_the_page_does_not_break_it():
    samples = [sample("Capital?", HOSTILE, "## x"), sample("**tuned**", "", "y", ended=False)]
    lines = samples_page(samples, 8, 1.1).splitlines()
    # Headings and names stand only where the page puts them: what an answer says is quoted.
    assert [line for line in lines if line.startswith("#")] == ["# Sample answers", "## Capital?", "## **tuned**"]
    assert [line for line in lines if line.startswith("**")] == ["**base**", "**tuned**"] * 2
    quoted = "\n".join(line.removeprefix(">").removeprefix(" ") for line in lines if line.startswith(">"))
    assert HOSTILE in quoted


@ships
def test_committed_metrics_show_a_better_model():
    """The figures in git are those of the embedded recipe: tuned is clearly better than base."""
    metrics = read_json(ROOT / "reports/metrics.json")
    assert len(metrics) == 7
    assert metrics["ratio"] < 1 and metrics["hi"] < 1
    if (ROOT / "reports/evaluation.json").exists():  # kept by DVC, not by git
        evaluation = read_json(ROOT / "reports/evaluation.json")
        assert metrics == headline(evaluation)
        assert evaluation["difference"]["loss_ci95_high"] < 0
        assert evaluation["tuned"]["perplexity"] < evaluation["base"]["perplexity"]
        assert "excludes zero" in "\n".join(table(evaluation, read_json(ROOT / "reports/exported.json")))

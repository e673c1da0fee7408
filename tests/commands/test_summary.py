"""The summary: figures, and one answer of base and tuned that can be read."""

import json
import re

import pytest

from commands.summary import one_sample


def sample(prompt: str, base: str, tuned: str, ended: bool = True) -> dict:
    return {"prompt": prompt, "base": {"text": base, "ended": ended}, "tuned": {"text": tuned, "ended": True}}


def test_one_sample_is_the_first_that_was_answered_differently():
    samples = [sample("Capital of France?", "Lyon", "Paris.\n\nIt is.", ended=False), sample("Other?", "x", "y")]
    assert one_sample(samples) == ["  Capital of France?", "", "  base: Lyon …", "", "  tuned: Paris. It is."]
    samples[0]["tuned"] = samples[0]["base"]
    assert one_sample(samples)[0] == "  Other?"
    # The same answers everywhere: the first is shown.
    assert one_sample(samples[:1])[0] == "  Capital of France?"


def test_an_answer_that_looks_like_the_page_of_samples_is_shown_as_it_is():
    """Once the summary read samples.md again, and such an answer ended `make all` in a ValueError."""
    hostile = "**base**\n\n> no\n## x\n**tuned**\n# Sample answers"
    samples = [sample("Capital?", hostile, "## x"), sample("**tuned**", "", "y", ended=False)]
    shown = one_sample(samples)
    assert shown[0] == "  Capital?"
    assert shown[2].startswith("  base: **base** > no ## x **tuned**")
    assert shown[-1] == "  tuned: ## x"
    # An empty answer that was cut is shown as such.
    assert one_sample(samples[1:]) == ["  **tuned**", "", "  base: …", "", "  tuned: y"]


@pytest.mark.slow
def test_the_summary_shows_figures_and_an_answer(finished):
    said = finished.run("commands", "summary").stdout
    assert "perplexity" in said and re.search("^  base: ", said, re.MULTILINE)
    samples = json.loads((finished.folder / "reports/samples.json").read_text(encoding="utf-8"))
    assert any(f"  {sample['prompt']}\n" in said for sample in samples)

"""Print what the pipeline made: base against tuned, one answer of each, where to look next.

Reads reports/ and dvc.lock (what they were made with); writes nothing. Run: `python -m stages.summary`; `make all`
ends with it.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.artifacts import read_json
from stages.common.errors import StageError, run_stage
from stages.common.params import PARAMS

REPORTS = Path("reports")
LOCK = Path("dvc.lock")
WIDTH = 96
SAMPLE_CHARACTERS = 280


def made_with() -> dict[str, Any]:
    """The parameters of the last finished run, which params.yaml may have left behind."""
    if not LOCK.exists():
        raise StageError("nothing was made yet. Run `make all`.")
    try:
        stages = YAML(typ="safe").load(LOCK.read_text(encoding="utf-8"))["stages"]
    except (YAMLError, ValueError, KeyError, TypeError):
        raise StageError(f"{LOCK} is damaged. `git checkout {LOCK}`, then `dvc repro`.") from None
    return {
        key: value for stage in stages.values() for key, value in stage.get("params", {}).get(str(PARAMS), {}).items()
    }


def table(metrics: dict) -> list[str]:
    """The lines of base against tuned."""
    base, tuned, difference, stops = (metrics[k] for k in ("base", "tuned", "difference", "stop_rate"))
    rows = [
        ("perplexity", f"{base['perplexity']:.2f}", f"{tuned['perplexity']:.2f}"),
        ("loss (nats a token)", f"{base['loss']:.3f}", f"{tuned['loss']:.3f}"),
        ("token accuracy", f"{base['token_accuracy']:.1%}", f"{tuned['token_accuracy']:.1%}"),
        (f"answers that end within {stops['max_new_tokens']} tokens", f"{stops['base']:.0%}", f"{stops['tuned']:.0%}"),
    ]
    lines = [f"  {'':38}{'base':>9}{'tuned':>9}"]
    lines += [f"  {name:38}{ours:>9}{theirs:>9}" for name, ours, theirs in rows]
    low, high = difference["loss_ci95_low"], difference["loss_ci95_high"]
    verdict = "excludes zero" if difference["significant"] else "includes zero: no difference is shown"
    lines.append(
        f"  difference of loss {difference['loss']:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]: it {verdict}"
    )
    return lines


def exported(report: dict) -> str:
    """The line about the exported model."""
    tuned = report["tuned"]
    return (
        f"For CPUs: models/onnx/, {report['precision']}, {tuned['bytes'] / 1e6:.0f} MB, perplexity "
        f"{tuned['perplexity']:.2f} ({tuned['perplexity_increase']:+.1%}). Chat with it: make serve, or make chat"
    )


def one_sample(page: str) -> list[str]:
    """The first prompt of samples.md answered differently, with both answers, wrapped for a terminal."""
    samples = [sample.split("**tuned**") for sample in page.split("\n## ")[1:]]
    different = [s for s in samples if s[0].partition("**base**")[2].strip() != s[-1].strip()]
    prompt, *answers = re.split(r"\*\*(?:base|tuned)\*\*", "**tuned**".join((different or samples)[0]))
    lines = [f"  {prompt.strip()}"]
    for name, answer in zip(("base", "tuned"), answers, strict=True):
        text = textwrap.shorten(answer.replace("\n>", " "), SAMPLE_CHARACTERS, placeholder=" …")
        lines += ["", *textwrap.wrap(f"{name}: {text}", WIDTH, initial_indent="  ", subsequent_indent="    ")]
    return lines


def main() -> None:
    metrics = read_json(REPORTS / "metrics.json", ["held_out", "base", "tuned", "difference", "stop_rate"])
    samples = REPORTS / "samples.md"
    if not samples.is_file():
        raise StageError(f"{samples} is missing. Run `dvc repro` to make it.")
    held_out, made = metrics["held_out"], made_with()
    print(f"\nBase {made['base_model']}\ntuned on {made['dataset']}, {made['max_steps']} steps")
    print(f"measured on {held_out['conversations']} held-out conversations, {held_out['supervised_tokens']} tokens:\n")
    print("\n".join(table(metrics)))
    print("\nOne answer side by side:\n")
    print("\n".join(one_sample(samples.read_text(encoding="utf-8"))))
    print(f"\n{exported(read_json(REPORTS / 'export.json'))}")
    print(
        "The model: models/merged/ (its card: README.md there). More answers: reports/samples.md."
        "\nAll figures: reports/metrics.json. The loss curve: dvc plots show. Another try: dvc exp run -S max_steps=24"
    )


if __name__ == "__main__":
    run_stage(main)

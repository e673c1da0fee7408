"""Print what the pipeline made: base against tuned, one answer of each, where to look next.

Reads reports/ and dvc.lock (what they were made with); writes nothing. Run: `python -m commands summary`; `make all`
ends with it.
"""

import textwrap
from pathlib import Path
from typing import Any

from commands.lockfile import parameters, read_lock
from stages.common.artifacts import read_json
from stages.common.errors import StageError
from stages.common.params import read_params

REPORTS = Path("reports")
WIDTH = 96
SAMPLE_CHARACTERS = 280


def table(evaluation: dict[str, Any], exported: dict[str, Any]) -> list[str]:
    """The lines of base against tuned, the exported model and the data's own answers."""
    base, tuned, difference, answers = (evaluation[k] for k in ("base", "tuned", "difference", "answers"))
    columns = {"base": base, "tuned": tuned, "exported": exported["tuned"], "data": {}}
    spoken = {**answers, "exported": exported["tuned"]["answers"], "data": answers["references"]}
    rows = [
        ("perplexity", "perplexity", "{:.2f}", columns),
        ("token accuracy", "token_accuracy", "{:.1%}", columns),
        (f"answers that end within {answers['max_new_tokens']} tokens", "ended", "{:.0%}", spoken),
        ("median length of an answer, tokens", "median_tokens", "{:.0f}", spoken),
        ("repeated sequences of 4 tokens", "repeated_4grams", "{:.1%}", spoken),
    ]
    lines = [f"  {'':38}" + "".join(f"{name:>10}" for name in columns)]
    for words, key, form, of in rows:
        cells = (form.format(of[name][key]) if key in of[name] else "" for name in columns)
        lines.append(f"  {words:38}" + "".join(f"{cell:>10}" for cell in cells))
    low, high = difference["loss_ci95_low"], difference["loss_ci95_high"]
    verdict = "excludes zero" if difference["significant"] else "includes zero: no difference is shown"
    lines.append(
        f"  difference of loss {difference['loss']:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]: it {verdict}"
    )
    return lines


def steps_of(made: dict[str, Any]) -> str:
    return f"{made['max_steps']} steps" if made["max_steps"] else f"{made['num_train_epochs']:g} passes"


def held_out_share(kept: dict[str, Any]) -> str:
    """How many of the trees that prepare kept are held out."""
    held, trees = kept["validation"]["trees"], sum(split["trees"] for split in kept.values())
    return f"held out {held} of {trees} trees ({held / trees:.1%})"


def exported(report: dict[str, Any]) -> str:
    """The line about the exported model."""
    tuned = report["tuned"]
    return (
        f"For CPUs: models/onnx/, {report['precision']}, {tuned['bytes'] / 1e6:.0f} MB, perplexity "
        f"{tuned['perplexity']:.2f} ({tuned['perplexity_increase']:+.1%}). Chat with it: make serve, or make chat"
    )


def one_sample(samples: list[dict[str, Any]]) -> list[str]:
    """The first sample that is answered differently, with both answers, wrapped for a terminal."""
    different = [sample for sample in samples if sample["base"]["text"] != sample["tuned"]["text"]]
    sample = (different or samples)[0]
    lines = [f"  {sample['prompt']}"]
    for name in ("base", "tuned"):
        answer = sample[name]["text"] + ("" if sample[name]["ended"] else " …")
        text = textwrap.shorten(answer, SAMPLE_CHARACTERS, placeholder=" …")
        lines += ["", *textwrap.wrap(f"{name}: {text}", WIDTH, initial_indent="  ", subsequent_indent="    ")]
    return lines


def main() -> None:
    read_params()
    made = parameters(read_lock())
    if not made:
        raise StageError("nothing was made yet. Run `make all`.")
    evaluation = read_json(REPORTS / "evaluation.json", ["held_out", "base", "tuned", "difference", "answers"])
    samples = read_json(REPORTS / "samples.json")
    held_out = evaluation["held_out"]
    print(f"\nBase {made['base_model']}\ntuned on {made['dataset']}, {steps_of(made)}")
    print(held_out_share(read_json(REPORTS / "funnel.json", ["kept"])["kept"]))
    print(
        f"measured on {held_out['conversations']} of {held_out['of']} held-out conversations, "
        f"{held_out['supervised_tokens']} tokens (the others are those of the loss curve);\n"
        f"answers are greedy, with a repetition penalty of {evaluation['answers']['repetition_penalty']}; "
        "data: the data's own answers:\n"
    )
    print("\n".join(table(evaluation, read_json(REPORTS / "exported.json"))))
    print("\nOne answer side by side:\n")
    print("\n".join(one_sample(samples)))
    print(f"\n{exported(read_json(REPORTS / 'exported.json'))}")
    print(
        "The model: models/merged/ (its card: README.md there). More answers: reports/samples.md.\n"
        "All figures: reports/evaluation.json. The loss curve: dvc plots show. Another try: dvc exp run -S lora_r=32"
    )

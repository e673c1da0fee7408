"""Compare the tuned model with its base: on the same held-out answers, and by what they answer.

Reads models/base/, models/merged/ and data/tokenized/.
Writes reports/metrics.json (loss, perplexity, token accuracy, their paired difference with a 95 % interval, how often
answers end by themselves), reports/conversations.csv (both losses of every held-out conversation) and
reports/samples.md (answers side by side). Run: `dvc repro evaluate`
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.common.artifacts import read_parquet, write_json, write_text, write_whole
from stages.common.errors import run_stage
from stages.common.models import load_model, load_tokenizer, torch_dtype
from stages.common.params import load_params
from stages.common.scoring import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = {"base": Path("models/base"), "tuned": Path("models/merged")}
TOKENIZED = Path("data/tokenized")
COLUMNS = ("input_ids", "assistant_masks", "length", "lang", "message_tree_id")  # what is read of a conversation
METRICS = Path("reports/metrics.json")
CONVERSATIONS = Path("reports/conversations.csv")
SAMPLES = Path("reports/samples.md")

# Fewer conversations than this give an interval that says nothing.
ENOUGH_FOR_A_LANGUAGE = 10


def summarise(scores: pd.DataFrame) -> dict[str, float]:
    """Loss (nats a token), perplexity (its exponential) and token accuracy of a model over all scored conversations."""
    loss = scores["nll"].sum() / scores["tokens"].sum()
    return {
        "loss": round(float(loss), 6),
        "perplexity": round(float(np.exp(loss)), 4),
        "token_accuracy": round(float(scores["correct"].sum() / scores["tokens"].sum()), 6),
    }


def paired_difference(base: pd.DataFrame, tuned: pd.DataFrame, samples: int, seed: int) -> dict[str, Any]:
    """Tuned loss minus base loss (nats a token; negative is better), with a 95 % percentile bootstrap interval.

    Whole conversations are resampled, with both models' scores, since tokens of one conversation are not independent
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The perplexity ratio is its exponential.
    """
    tokens = base["tokens"].to_numpy()
    gain = (tuned["nll"] - base["nll"]).to_numpy()
    picks = np.random.default_rng(seed).integers(len(tokens), size=(samples, len(tokens)))
    resampled = gain[picks].sum(axis=1) / tokens[picks].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    difference = gain.sum() / tokens.sum()
    return {
        "loss": round(float(difference), 6),
        "loss_ci95_low": round(float(low), 6),
        "loss_ci95_high": round(float(high), 6),
        "perplexity_ratio": round(float(np.exp(difference)), 6),
        "perplexity_ratio_ci95_low": round(float(np.exp(low)), 6),
        "perplexity_ratio_ci95_high": round(float(np.exp(high)), 6),
        "significant": bool(low > 0 or high < 0),
    }


def compare(scores: dict[str, pd.DataFrame], languages: pd.Series, samples: int, seed: int) -> dict[str, Any]:
    """What reports/metrics.json says of the held-out loss: overall, and by language where there are several."""
    base, tuned = scores["base"], scores["tuned"]
    result: dict[str, Any] = {
        "held_out": {"conversations": len(base), "supervised_tokens": int(base["tokens"].sum())},
        "base": summarise(base),
        "tuned": summarise(tuned),
        "difference": paired_difference(base, tuned, samples, seed),
        "by_language": {},
    }
    for language, members in languages.groupby(languages).groups.items():
        if ENOUGH_FOR_A_LANGUAGE <= len(members) < len(languages):
            ours, theirs = tuned.loc[members], base.loc[members]
            result["by_language"][language] = {
                "conversations": len(members),
                "base": summarise(theirs),
                "tuned": summarise(ours),
                "difference": paired_difference(theirs, ours, samples, seed),
            }
    return result


def question_of(row: Any) -> list[int]:
    """The token ids of a held-out conversation up to where its first answer begins."""
    return list(row.input_ids[: list(row.assistant_masks).index(1)])


def answer(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[str, bool]]:
    """The greedy answer to each prompt (token ids), and whether it ended by itself within `max_new_tokens`."""
    import torch
    from transformers import GenerationConfig

    # Both models decode alike: what a base model brings (a repetition penalty, say) would blur the comparison.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: dict[int, tuple[str, bool]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(prompts[batch[-1]])
        padding = [longest - len(prompts[i]) for i in batch]
        ids = [[tokenizer.pad_token_id] * n + prompts[i] for n, i in zip(padding, batch, strict=True)]
        attention = [[0] * n + [1] * (longest - n) for n in padding]
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(attention, device=model.device),
            )
        for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
            stopped = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if stopped else row
            answers[i] = (tokenizer.decode(kept, skip_special_tokens=True).strip(), stopped)
    return [answers[i] for i in range(len(prompts))]


def samples_page(prompts: list[str], answers: dict[str, list[tuple[str, bool]]], max_new_tokens: int) -> str:
    """Markdown: each prompt with the base model's answer and the tuned model's below it."""
    parts = [
        "# Sample answers\n\nGreedy decoding, at most "
        f"{max_new_tokens} tokens; “…” marks an answer that was cut there. Base: the model as fetched.\n"
    ]
    for i, prompt in enumerate(prompts):
        parts.append(f"## {prompt}\n")
        for name in MODELS:
            text, stopped = answers[name][i]
            quoted = "\n".join(f"> {line}".rstrip() for line in (text + ("" if stopped else " …")).splitlines())
            parts.append(f"**{name}**\n\n{quoted}\n")
    return "\n".join(parts)


def main() -> None:
    params = load_params("evaluate")
    rows = read_parquet(TOKENIZED / "validation.parquet", COLUMNS)
    tokenizer = load_tokenizer(TOKENIZED / "tokenizer")
    system = [{"role": "system", "content": params.system_prompt}] if params.system_prompt else []
    fixed = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in params.sample_prompts
    ]
    prompts = fixed + [question_of(row) for row in rows.head(params.stop_prompts).itertuples()]

    from tqdm.auto import tqdm

    scores, answers, stop_rates = {}, {}, {}
    for name, folder in MODELS.items():
        print(f"evaluate: {name} model", flush=True)
        model = load_model(folder, torch_dtype(params.eval_dtype)).eval()
        with tqdm(total=len(rows), desc="scoring held-out answers", unit="conv") as bar:
            scores[name] = score(model, rows, params.per_device_eval_batch_size, tokenizer.pad_token_id, bar.update)
        print(f"evaluate: answering {len(prompts)} prompts, at most {params.max_new_tokens} tokens each", flush=True)
        answers[name] = answer(model, prompts, tokenizer, params.max_new_tokens, params.per_device_eval_batch_size)
        stop_rates[name] = round(sum(stopped for _, stopped in answers[name]) / len(prompts), 4)
        del model

    metrics = compare(scores, rows["lang"], params.bootstrap_samples, params.seed)
    metrics["stop_rate"] = {"prompts": len(prompts), "max_new_tokens": params.max_new_tokens, **stop_rates}
    per_token = {f"{name}_loss": (s["nll"] / s["tokens"]).round(6) for name, s in scores.items()}
    table = pd.DataFrame(
        {
            "message_tree_id": rows["message_tree_id"],
            "lang": rows["lang"],
            "tokens": scores["base"]["tokens"],
            **per_token,
        }
    )
    with write_whole(CONVERSATIONS) as conversations, write_whole(SAMPLES) as samples, write_whole(METRICS) as figures:
        table.to_csv(conversations, index=False)
        write_text(samples, samples_page(params.sample_prompts, answers, params.max_new_tokens))
        write_json(figures, metrics)
    difference = metrics["difference"]
    print(
        f"evaluate: perplexity {metrics['base']['perplexity']:.2f} -> {metrics['tuned']['perplexity']:.2f} on "
        f"{metrics['held_out']['supervised_tokens']} held-out tokens; loss {difference['loss']:+.3f} nats a token "
        f"[{difference['loss_ci95_low']:+.3f}, {difference['loss_ci95_high']:+.3f}]"
    )


if __name__ == "__main__":
    run_stage(main, one_at_a_time=True)

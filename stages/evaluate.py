"""Compare the tuned model with its base: on the same held-out answers, and by what they answer.

Reads models/base/, models/merged/ and data/tokenized/.
Writes reports/metrics.json (the few numbers that one compares), reports/evaluation.json (all figures: loss, perplexity,
token accuracy, their paired difference with a 95 % interval; whether answers end, how long they are, what they repeat),
reports/conversations.csv (both losses of every held-out conversation), reports/samples.json (the sample answers) and
reports/samples.md (the same to read, side by side). Run: `dvc repro evaluate`
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from stages.common.answers import answer_figures, ended, reference_of
from stages.common.artifacts import read_parquet, write_json, write_text, write_whole
from stages.common.chat import Chat, end_ids
from stages.common.generation import greedy_answers
from stages.common.halves import judging
from stages.common.masks import question_of
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model, torch_dtype
from stages.common.params import load_params
from stages.common.schema import EvaluateParams
from stages.common.scoring import accuracy_of, loss_of, perplexity_of, score

MODELS = {"base": Path("models/base"), "tuned": Path("models/merged")}
TOKENIZED = Path("data/tokenized")
COLUMNS = ("input_ids", "assistant_masks", "length", "lang", "message_tree_id")  # what is read of a conversation
REPORTS = Path("reports")
METRICS = REPORTS / "metrics.json"
EVALUATION = REPORTS / "evaluation.json"
CONVERSATIONS = REPORTS / "conversations.csv"
SAMPLES = REPORTS / "samples.json"
SAMPLES_PAGE = REPORTS / "samples.md"

# An interval over fewer conversations than this shows nothing.
MIN_CONVERSATIONS_OF_A_LANGUAGE = 10


def summarise(scores: pd.DataFrame) -> dict[str, float]:
    """Loss (nats a token), perplexity (its exponential) and token accuracy of a model over all scored conversations."""
    return {
        "loss": round(loss_of(scores), 6),
        "perplexity": round(perplexity_of(scores), 4),
        "token_accuracy": round(accuracy_of(scores), 6),
    }


def paired_difference(base: pd.DataFrame, tuned: pd.DataFrame, samples: int, seed: int) -> dict[str, Any]:
    """Tuned loss minus base loss (nats a token; negative is better), with a 95 % percentile bootstrap interval.

    Conversations are resampled, each with both models' scores, because tokens of one conversation are not independent
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
    """All figures of the held-out loss: overall, and by language where there are several."""
    base, tuned = scores["base"], scores["tuned"]
    result: dict[str, Any] = {
        "held_out": {"conversations": len(base), "supervised_tokens": int(base["tokens"].sum())},
        "base": summarise(base),
        "tuned": summarise(tuned),
        "difference": paired_difference(base, tuned, samples, seed),
        "by_language": {},
    }
    for language, members in languages.groupby(languages).groups.items():
        if MIN_CONVERSATIONS_OF_A_LANGUAGE <= len(members) < len(languages):
            ours, theirs = tuned.loc[members], base.loc[members]
            result["by_language"][language] = {
                "conversations": len(members),
                "base": summarise(theirs),
                "tuned": summarise(ours),
                "difference": paired_difference(theirs, ours, samples, seed),
            }
    return result


def headline(evaluation: dict[str, Any]) -> dict[str, float]:
    """The metrics that DVC shows and compares. Short names and values: `dvc exp show` has room for nine beside each
    other in 120 columns.

    ppl: the tuned model's perplexity; ratio, lo, hi: over the base's, with its 95 % interval; stops, base_stops: share
    of the tuned and the base model's answers that end by themselves; len: median tokens of the tuned model's answers.
    """
    difference, answers = evaluation["difference"], evaluation["answers"]
    return {
        "ppl": evaluation["tuned"]["perplexity"],
        "ratio": round(difference["perplexity_ratio"], 4),
        "lo": round(difference["perplexity_ratio_ci95_low"], 4),
        "hi": round(difference["perplexity_ratio_ci95_high"], 4),
        "stops": round(answers["tuned"]["ended"], 3),
        "base_stops": round(answers["base"]["ended"], 3),
        "len": answers["tuned"]["median_tokens"],
    }


def prompts_of(params: EvaluateParams, rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of the sample prompts, and then of the first `stop_prompts` held-out questions."""
    system = [{"role": "system", "content": params.system_prompt}] if params.system_prompt else []
    chat = Chat.of(tokenizer)
    samples = [chat.ids([*system, {"role": "user", "content": prompt}]) for prompt in params.sample_prompts]
    return samples + [question_of(row) for row in rows.head(params.stop_prompts).itertuples()]


def sample_records(
    prompts: list[str], answers: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Each sample prompt with each model's answer: its text, and whether it ended by itself."""
    ends = end_ids(tokenizer)
    return [
        {
            "prompt": prompt,
            **{
                name: {
                    "text": tokenizer.decode(ids[i], skip_special_tokens=True).strip(),
                    "ended": ended(ids[i], ends),
                }
                for name, ids in answers.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


def samples_page(samples: list[dict[str, Any]], max_new_tokens: int, repetition_penalty: float) -> str:
    """Markdown: each prompt with the base model's answer and the tuned model's below it."""
    parts = [
        f"# Sample answers\n\nGreedy decoding with a repetition penalty of {repetition_penalty}, at most "
        f"{max_new_tokens} tokens; “…” marks an answer that was cut there. Base: the model as fetched.\n"
    ]
    for sample in samples:
        parts.append(f"## {sample['prompt']}\n")
        for name in MODELS:
            text = sample[name]["text"] + ("" if sample[name]["ended"] else " …")
            quoted = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
            parts.append(f"**{name}**\n\n{quoted}\n")
    return "\n".join(parts)


def conversation_losses(rows: pd.DataFrame, scores: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Both models' loss (nats a supervised token) on every held-out conversation."""
    per_token = {f"{name}_loss": (s["nll"] / s["tokens"]).round(6) for name, s in scores.items()}
    known = {"message_tree_id": rows["message_tree_id"], "lang": rows["lang"], "tokens": scores["base"]["tokens"]}
    return pd.DataFrame({**known, **per_token})


def main() -> None:
    params = load_params(EvaluateParams)
    held_out = read_parquet(TOKENIZED / "validation.parquet", COLUMNS)
    rows = judging(held_out)
    tokenizer = load_tokenizer(TOKENIZED / "tokenizer")
    prompts = prompts_of(params, rows, tokenizer)

    scores: dict[str, pd.DataFrame] = {}
    answers: dict[str, list[list[int]]] = {}
    batch_size = params.per_device_eval_batch_size
    for name, folder in MODELS.items():
        print(f"evaluate: {name} model", flush=True)
        model = load_model(folder, torch_dtype(params.eval_dtype)).eval()
        with tqdm(total=len(rows), desc="scoring held-out answers", unit="conv") as bar:
            scores[name] = score(model, rows, batch_size, tokenizer.pad_token_id, bar.update)
        print(f"evaluate: answering {len(prompts)} prompts, at most {params.max_new_tokens} tokens each", flush=True)
        answers[name] = greedy_answers(
            model, tokenizer, prompts, params.max_new_tokens, params.answer_batch_size, params.repetition_penalty
        )
        del model

    evaluation = compare(scores, rows["lang"], params.bootstrap_samples, params.seed)
    evaluation["held_out"]["of"] = len(held_out)
    ends, count = end_ids(tokenizer), len(params.sample_prompts)
    references = [reference_of(row, params.max_new_tokens) for row in rows.head(params.stop_prompts).itertuples()]
    evaluation["answers"] = {
        "prompts": len(references),
        "max_new_tokens": params.max_new_tokens,
        "repetition_penalty": params.repetition_penalty,
        "references": answer_figures(references, ends),
        **{name: answer_figures(of_model[count:], ends) for name, of_model in answers.items()},
    }
    samples = sample_records(params.sample_prompts, answers, tokenizer)
    with write_whole(CONVERSATIONS) as table, write_whole(EVALUATION) as figures, write_whole(METRICS) as metrics:
        conversation_losses(rows, scores).to_csv(table, index=False)
        write_json(SAMPLES, samples)
        write_text(SAMPLES_PAGE, samples_page(samples, params.max_new_tokens, params.repetition_penalty))
        write_json(figures, evaluation)
        write_json(metrics, headline(evaluation))
    difference = evaluation["difference"]
    print(
        f"evaluate: perplexity {evaluation['base']['perplexity']:.2f} -> {evaluation['tuned']['perplexity']:.2f} on "
        f"{evaluation['held_out']['supervised_tokens']} held-out tokens; loss {difference['loss']:+.3f} nats a token "
        f"[{difference['loss_ci95_low']:+.3f}, {difference['loss_ci95_high']:+.3f}]"
    )

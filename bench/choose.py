"""What a finished run does on the half of the held-out conversations that chooses: perplexity and answers.

evaluate reports the other half, which must not be looked at while parameters are chosen. Choose by this command.
Run: `python -m bench.choose` (2 minutes; needs the outputs of `dvc repro merge`)
"""

from stages.common.answers import answer_figures, reference_of
from stages.common.artifacts import read_parquet
from stages.common.chat import end_ids
from stages.common.generation import greedy_answers
from stages.common.halves import choosing
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model, torch_dtype
from stages.common.params import load_params
from stages.common.schema import EvaluateParams
from stages.common.scoring import loss_of, score
from stages.evaluate import COLUMNS, MODELS, TOKENIZED, paired_difference, prompts_of


def main() -> None:
    params = load_params(EvaluateParams)
    rows = choosing(read_parquet(TOKENIZED / "validation.parquet", COLUMNS))
    tokenizer = load_tokenizer(TOKENIZED / "tokenizer")
    prompts = prompts_of(params, rows, tokenizer)[len(params.sample_prompts) :]
    ends = end_ids(tokenizer)
    references = [reference_of(row, params.max_new_tokens) for row in rows.head(params.stop_prompts).itertuples()]
    scores, figures = {}, {"the data's own": answer_figures(references, ends)}
    for name, folder in MODELS.items():
        model = load_model(folder, torch_dtype(params.eval_dtype)).eval()
        scores[name] = score(model, rows, params.per_device_eval_batch_size, tokenizer.pad_token_id)
        answers = greedy_answers(
            model, tokenizer, prompts, params.max_new_tokens, params.answer_batch_size, params.repetition_penalty
        )
        figures[name] = answer_figures(answers, ends)
    for name, found in figures.items():
        print(
            f"{name}: {found['ended']:.0%} of {len(references)} answers end, median {found['median_tokens']} tokens, "
            f"{found['repeated_4grams']:.1%} repeated sequences of 4 tokens"
        )
    difference = paired_difference(scores["base"], scores["tuned"], params.bootstrap_samples, params.seed)
    ratio, low, high = (difference[f"perplexity_ratio{end}"] for end in ("", "_ci95_low", "_ci95_high"))
    print(
        f"loss {loss_of(scores['base']):.4f} -> {loss_of(scores['tuned']):.4f} nats a token, perplexity times "
        f"{ratio:.3f} [{low:.3f}, {high:.3f}], on {len(rows)} conversations"
    )


if __name__ == "__main__":
    main()

"""Training speed on a CPU, side by side: this project, a plain TRL script, TRL with packing, and the machine's limit.

Each side is a process of its own that trains on the same 16 conversations of data/tokenized/, one optimiser step a
turn; the sides take turns. It writes bench/results/train.json and the table in docs/measurements.md.

| side | what it is |
| --- | --- |
| literal | a plain TRL script of the reference recipe: random order, padding, checkpointing, dropout, float32 |
| packed | TRL at its best settings: packing, no checkpointing, no dropout |
| project | params.yaml as this project trains it |
| bare | forward and backward of the base model in float32, without 4 bits, adapter and optimiser |
| floor | the operations that must be done, at the rate of this model's own matrix products |

Run: `python -m bench.train` (20 minutes; needs `dvc repro tokenize fetch_model`); `--repeats`
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bench.chat_server import ROOT
from bench.floor import floor_rates, operations
from bench.machine import processor, publish
from bench.turns import Side, seconds, wait_for_turn
from stages.common.adapters import add_adapter
from stages.common.artifacts import read_parquet, write_json
from stages.common.halves import choosing
from stages.common.masks import supervised_tokens
from stages.common.memory import GIB
from stages.common.model_files import load_config, load_tokenizer
from stages.common.models import load_model, quantization_config, torch_dtype, training_dtype
from stages.common.params import read_params
from stages.common.schema import Params
from stages.common.scoring import loss_of, score
from stages.common.trainer import build_trainer, to_dataset

BASE, TOKENIZED = ROOT / "models/base", ROOT / "data/tokenized"
RESULTS = ROOT / "bench/results/train.json"
CONVERSATIONS, PACK = 16, 1024
DROPOUT = 0.05  # of the reference recipe
SIDES = ("literal", "packed", "project", "bare", "floor")
CHANGES = {  # of params.yaml: what all sides share
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "num_train_epochs": None,
    "fp16": False,
}


def shared_params(repeats: int, bf16: bool) -> Params:
    """params.yaml with one step a turn; the first turn is not timed."""
    steps = {"max_steps": repeats + 1, "eval_steps": repeats + 1, "save_steps": repeats + 1}
    return read_params(ROOT / "params.yaml").model_copy(update={**CHANGES, **steps, "bf16": bf16})


def steps(params: Params) -> int:
    assert params.max_steps is not None
    return params.max_steps


def conversations() -> pd.DataFrame:
    """The conversations of a turn: spread over the training split, so that their lengths are as there."""
    rows = read_parquet(TOKENIZED / "train.parquet")
    return rows.iloc[:: len(rows) // CONVERSATIONS].head(CONVERSATIONS).reset_index(drop=True)


class TakeTurns(TrainerCallback):
    """Wait for the parent before each optimiser step, and print the step's seconds after it."""

    began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        wait_for_turn()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        print(json.dumps({"seconds": time.perf_counter() - self.began}), flush=True)


def adapted(params: Params) -> Any:
    dtype = torch_dtype(training_dtype(params.fp16, params.bf16))
    quantization = quantization_config(params, dtype)
    model = load_model(BASE, dtype, quantization=quantization, attn_implementation=params.attn_implementation)
    return add_adapter(model, params)


def plain_trainer(side: str, params: Params, rows: pd.DataFrame, tokenizer: Any, folder: str) -> SFTTrainer:
    """A plain TRL script's trainer, literal or packed, in TRL's own loop."""
    literal = side == "literal"
    data = to_dataset(rows).remove_columns("length")
    if not literal:
        data = pack_dataset(data, PACK, "bfd")
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=params.per_device_train_batch_size if literal else 1,
        gradient_accumulation_steps=params.gradient_accumulation_steps if literal else len(data),
        max_steps=params.max_steps,
        learning_rate=params.learning_rate,
        lr_scheduler_type="constant",
        optim=params.optim,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=literal,
        bf16=params.bf16,
        fp16=False,
        padding_free=not literal,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=params.seed,
    )
    model = adapted(params.model_copy(update={"lora_dropout": DROPOUT if literal else 0.0}))
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def train_side(side: str, params: Params, rows: pd.DataFrame) -> Iterator[dict[str, float]]:
    """Train in turns; yields the held-out loss afterwards."""
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(TOKENIZED / "tokenizer")
    held_out = choosing(read_parquet(TOKENIZED / "validation.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        if side == "project":
            trainer: Trainer = build_trainer(adapted(params), params, Path(folder), (rows, held_out), tokenizer)
            trainer.args.eval_strategy = trainer.args.save_strategy = "no"
            trainer.args.eval_on_start = False
        else:
            trainer = plain_trainer(side, params, rows, tokenizer, folder)
        trainer.add_callback(TakeTurns())
        trainer.train()
    wait_for_turn()  # an evaluation would disturb the other sides' last turns
    peak = peak_memory()
    yield {"held_out_loss": loss_of(score(trainer.model, held_out, 8, tokenizer.pad_token_id)), "peak": peak}


def bare_side(params: Params, rows: pd.DataFrame) -> Iterator[dict[str, float]]:
    """Forward and backward to the embeddings of the dense base model, in micro-batches of like lengths."""
    model = load_model(BASE, torch_dtype(training_dtype(False, params.bf16))).train().requires_grad_(False)
    collate = DataCollatorForLanguageModeling(load_tokenizer(TOKENIZED / "tokenizer").pad_token_id)
    data = list(to_dataset(rows.sort_values("length")))
    size = params.per_device_train_batch_size
    batches = [collate(data[start : start + size]) for start in range(0, len(data), size)]

    def turn() -> None:
        for batch in batches:
            embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            mask, labels = batch["attention_mask"], batch["labels"]
            model(inputs_embeds=embedded, attention_mask=mask, labels=labels, use_cache=False).loss.backward()

    for _ in range(steps(params)):
        wait_for_turn()
        print(json.dumps({"seconds": seconds(turn)}), flush=True)
    wait_for_turn()
    yield {"peak": peak_memory()}


def floor_side(params: Params, rows: pd.DataFrame) -> Iterator[dict[str, float]]:
    """The time of a turn's operations at the rate of the frozen layers' own products."""
    needed, shapes = operations(load_config(BASE), rows, params.target_modules, params.lora_r)
    total = sum(needed.values())
    tokens = int(rows["length"].sum()) * params.per_device_train_batch_size // len(rows)
    rates = floor_rates(shapes, tokens, torch_dtype(training_dtype(False, params.bf16)))
    for _ in range(steps(params)):
        wait_for_turn()
        rate = next(rates)
        print(json.dumps({"seconds": total / rate, "gflops": rate / 1e9}), flush=True)
    wait_for_turn()
    yield {f"share of {name}": value / total for name, value in needed.items()}


def peak_memory() -> float:
    """This process's peak resident memory, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def run(names: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each side over its turns, and what it said at its end."""
    command = [sys.executable, "-m", "bench.train", "--repeats", str(repeats), "--side"]
    sides = [Side(name, [*command, name]) for name in names]
    for turn in range(repeats + 1):
        for side in sides:
            record = side.turn()
            if turn:  # the first one warms up
                side.turns.append(record)
            print(f"turn {turn}: {side.name} {record['seconds']:.2f} s", flush=True)
            side.read_until_ready()
    found = {}
    for side in sides:
        medians = {key: statistics.median(turn[key] for turn in side.turns) for key in side.turns[0]}
        found[side.name] = {**medians, **side.turn()}
        side.process.wait()
    return found


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text()))


def table(results: dict[str, Any]) -> str:
    """The table of docs/measurements.md."""
    sides, tokens = results["sides"], results["tokens"]
    lines = [
        f"{results['machine']}; torch {results['torch']}, trl {results['trl']}; medians of {results['repeats']} turns, "
        f"each one optimiser step on {CONVERSATIONS} conversations of {tokens:,} tokens.",
        "",
        "| side | tokens/s | project / side | peak memory, GiB | held-out loss, nats a token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, side in sides.items():
        ours = sides["project_bf16" if name.endswith("_bf16") else "project"]["seconds"]
        peak, loss = (
            f"{side[key]:.{digits}f}" if key in side else "" for key, digits in (("peak", 1), ("held_out_loss", 3))
        )
        lines.append(f"| {name} | {tokens / side['seconds']:.0f} | {side['seconds'] / ours:.2f} | {peak} | {loss} |")
    gflops = ", ".join(f"{name}: {side['gflops']:.0f}" for name, side in sides.items() if "gflops" in side)
    return "\n".join([*lines, "", f"Matrix products of the floor, in GFLOP/s: {gflops}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", help="of a child process")
    options = parser.parse_args()
    rows = conversations()
    if options.side:
        name, _, half = options.side.partition("_")
        params = shared_params(options.repeats, bool(half))
        work = {"bare": bare_side, "floor": floor_side}.get(name) or partial(train_side, name)
        for record in work(params, rows):
            print(json.dumps(record), flush=True)
        return
    names = [*SIDES, *(["project_bf16", "floor_bf16"] if has_bfloat16() else [])]
    results = {
        "machine": processor(),
        **{package: version(package) for package in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "repeats": options.repeats,
        "tokens": int(rows["length"].sum()),
        "supervised_tokens": supervised_tokens(rows),
        "sides": run(names, options.repeats),
    }
    write_json(RESULTS, results)
    publish("bench.train", table(results))


if __name__ == "__main__":
    main()

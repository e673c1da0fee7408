"""Compare this project's training on a CPU with what people would use instead, and with the arithmetic it cannot avoid.

Each side trains the base model by QLoRA for one pass over the same conversations, in a process of its own: a plain TRL
script with the recipe taken literally (`literal`), TRL at its best settings (`packed`), this project (`project`), and
the forward and backward pass of the dense model without adapter and trainer (`bare`). The floor is the time of the
floating-point operations that must be done, at the rate that torch's matrix products reach here on the model's shapes.
Where the CPU computes in bfloat16, the project's side and the floor are measured in it, too.
Writes bench/results/train.json and the table in docs/measurements.md. Run: `python -m bench.train` (10 minutes; needs
data/tokenized/ and models/base/)
"""

import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset

from bench.chat_server import ROOT
from commands.commit import project_commit
from stages.common.adapters import add_adapter, lora_config
from stages.common.artifacts import write_json, write_text
from stages.common.errors import StageError
from stages.common.halves import choosing
from stages.common.masks import supervised_tokens
from stages.common.model_files import linear_layers, load_config, load_tokenizer
from stages.common.models import load_model, quantization_config, torch_dtype, training_dtype
from stages.common.params import read_params
from stages.common.schema import Params
from stages.common.scoring import loss_of, score
from stages.common.trainer import build_trainer, to_dataset

BASE, TOKENIZED = ROOT / "models/base", ROOT / "data/tokenized"
RESULTS, PAGE = ROOT / "bench/results/train.json", ROOT / "docs/measurements.md"
START, END = "<!-- made by python -m bench.train -->\n", "<!-- end -->\n"
SPLITS = ("train", "validation")
COLUMNS = ["input_ids", "assistant_masks", "length", "message_tree_id"]
REPEATS = 15  # of each matrix product
WORDS = {
    "literal": "a plain TRL script: random order, padding, dropout, checkpointing",
    "packed": "TRL at its best: packed, no dropout, no checkpointing",
    "project": "this project",
    "bare": "forward and backward of the dense model alone, all logits",
    "floor": "the arithmetic that must be done, at the rate of matrix products here",
    "project_bf16": "this project in bfloat16",
    "floor_bf16": "the floor in bfloat16",
}


class StepTimes(TrainerCallback):
    """Notes the seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The conversations to train on, and those of the held-out loss."""
    train, held_out = (pd.read_parquet(TOKENIZED / f"{split}.parquet", columns=COLUMNS) for split in SPLITS)
    return train, choosing(held_out)


def settings(**changes: Any) -> Params:
    """The embedded recipe's parameters for one pass, in which nothing but training takes time."""
    once = {"max_steps": None, "num_train_epochs": 1.0, "lora_dropout": 0.0, "gradient_checkpointing": False}
    quiet = {"logging_steps": 1000, "save_steps": 1000, "eval_steps": 1000}
    return read_params(ROOT / "recipes/smollm2-cpu.yaml").model_copy(update={**once, **quiet, **changes})


def by_trl(params: Params, folder: Path, packed: bool) -> tuple[Any, SFTTrainer]:
    """A plain TRL trainer; packed rows are as many a step as hold the same conversations."""
    train, _ = tables()
    dataset, rows = to_dataset(train).remove_columns("length"), params.per_device_train_batch_size
    if packed:
        steps = math.ceil(len(dataset) / (rows * params.gradient_accumulation_steps))
        dataset = pack_dataset(dataset, params.max_length, "bfd")
        rows = math.ceil(len(dataset) / steps / params.gradient_accumulation_steps)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        num_train_epochs=1,
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_ratio,
        max_grad_norm=params.max_grad_norm,
        optim=params.optim,
        packing=packed,
        max_length=params.max_length if packed else None,
        gradient_checkpointing=params.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=params.seed,
    )
    model = load_model(BASE, torch.float32, quantization=quantization_config(params, torch.float32))
    trainer = SFTTrainer(
        model=get_peft_model(model, lora_config(params)),
        args=arguments,
        train_dataset=dataset,
        processing_class=load_tokenizer(TOKENIZED / "tokenizer"),
    )
    return trainer.model, trainer


def by_project(params: Params, folder: Path) -> tuple[Any, SFTTrainer]:
    dtype = torch_dtype(training_dtype(params.fp16, params.bf16))
    model = add_adapter(load_model(BASE, dtype, quantization=quantization_config(params, dtype)), params)
    train, held_out = tables()
    trainer = build_trainer(model, params, folder, (train, held_out.head(1)), load_tokenizer(TOKENIZED / "tokenizer"))
    trainer.args.eval_strategy, trainer.args.eval_on_start = "no", False
    return trainer.model, trainer


def trained(make: Callable[[Path], tuple[Any, SFTTrainer]]) -> dict[str, Any]:
    """Train one pass; real tokens a second in its steps, the memory's peak and the held-out loss after it."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        model, trainer = make(Path(folder))
        trainer.add_callback(times)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    train, held_out = tables()
    tokens = int(train["length"].sum())
    loss = loss_of(score(model, held_out, 8, load_tokenizer(TOKENIZED / "tokenizer").pad_token_id))
    return {
        "steps": len(times.seconds),
        "tokens_per_second": tokens / sum(times.seconds),
        "peak_gib": peak,
        "held_out_loss": loss,
    }


def bare(params: Params) -> dict[str, Any]:
    """Forward and backward of the dense model down to its embeddings, no trainer and no adapter: batches of like
    lengths, cross entropy over all tokens."""
    model = load_model(BASE, torch.float32).train().requires_grad_(False)
    train, _ = tables()
    rows = train.sort_values("length").reset_index(drop=True)
    size, rates = params.per_device_train_batch_size, []
    for start in range(0, len(rows) - size, 4 * size):  # every fourth batch: all lengths
        part = rows.iloc[start : start + size]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(x)) for x in part["input_ids"]], batch_first=True)
        began = time.perf_counter()
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        rates.append(int(part["length"].sum()) / (time.perf_counter() - began))
    return {"tokens_per_second": statistics.median(rates), "steps": len(rates)}


def product_rate(tokens: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of these sizes."""
    x, weight = torch.randn(tokens, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        x @ weight.T
        times.append(time.perf_counter() - began)
    return 2 * tokens * inner * outer / statistics.median(times)


def floor(params: Params, dtype: torch.dtype) -> dict[str, Any]:
    """The operations of one pass that no implementation can leave out, at the rate of this machine's matrix products.

    Frozen linear layers forward and input gradient, the output layer on supervised tokens forward and input gradient,
    LoRA forward, input and weight gradients, causal attention (two products forward, five backward).
    """
    train, _ = tables()
    tokens, config = int(train["length"].sum()), load_config(BASE)
    batch = tokens * params.per_device_train_batch_size // len(train)
    model = load_model(BASE, torch.float32)
    seconds = operations = 0.0
    rates: dict[tuple[int, int], float] = {}
    for layer in linear_layers(model).values():
        outer, inner = layer.weight.shape
        rate = rates.setdefault((inner, outer), product_rate(batch, inner, outer, dtype))
        operations += 4 * tokens * inner * outer
        seconds += 4 * tokens * inner * outer / rate
    overall = operations / seconds
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    head = 4 * supervised_tokens(train) * vocabulary * hidden
    adapter = sum(p.numel() for p in get_peft_model(model, lora_config(params)).parameters() if p.requires_grad)
    attention = 7 * float((train["length"].astype(float) ** 2).sum()) * hidden * config.num_hidden_layers
    seconds += head / product_rate(batch, hidden, vocabulary, dtype) + (6 * tokens * adapter + attention) / overall
    return {"tokens_per_second": tokens / seconds, "products_gflops": overall / 1e9}


def side(name: str) -> dict[str, Any]:
    """Measure one side, in this process."""
    quick = settings()
    match name:
        case "literal":
            slow = settings(lora_dropout=0.05, gradient_checkpointing=True)
            return trained(lambda folder: by_trl(slow, folder, packed=False))
        case "packed":
            return trained(lambda folder: by_trl(quick, folder, packed=True))
        case "project":
            return trained(lambda folder: by_project(quick, folder))
        case "project_bf16":
            return trained(lambda folder: by_project(settings(bf16=True), folder))
        case "bare":
            return bare(quick)
        case "floor":
            return floor(quick, torch.float32)
        case "floor_bf16":
            return floor(quick, torch.bfloat16)
    raise StageError(f"bench.train: no side {name}: use one of {', '.join(WORDS)}.")


def processor() -> tuple[str, set[str]]:
    """The name of this machine's processor, and its flags; empty where the system does not say them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return fields.get("model name", ""), set(fields.get("flags", "").split())


def table(results: dict[str, Any]) -> str:
    """The results as the page shows them."""
    sides, lines = results["sides"], []
    here = results["machine"]
    versions = ", ".join(f"{package} {here[package]}" for package in ("torch", "trl"))
    lines.append(f"On {here['threads']} cores of an {here['processor']}, {versions}. One pass over")
    lines.append(f"{results['conversations']} conversations: {results['tokens']:,} tokens, of which")
    lines.append(f"{results['supervised']:,} are supervised.\n")
    lines.append("| side | real tokens/s | of the floor | peak memory | held-out loss after it |")
    lines.append("| --- | --- | --- | --- | --- |")
    for name, found in sides.items():
        rate, base = found["tokens_per_second"], sides["floor_bf16" if name.endswith("bf16") else "floor"]
        memory = f"{found['peak_gib']:.2f} GiB" if "peak_gib" in found else "–"
        loss = f"{found['held_out_loss']:.3f}" if "held_out_loss" in found else "–"
        lines.append(f"| {WORDS[name]} | {rate:.0f} | {rate / base['tokens_per_second']:.2f} | {memory} | {loss} |")
    ours, literal, packed = (sides[name]["tokens_per_second"] for name in ("project", "literal", "packed"))
    lines.append(f"\nThis project is {ours / literal:.2f} times as fast as the literal script, and")
    lines.append(f"{ours / packed:.2f} times as fast as packed TRL.")
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(side(sys.argv[1])))
        return
    name, flags = processor()
    names = [side for side in WORDS if not side.endswith("bf16") or flags & {"avx512_bf16", "amx_bf16"}]
    train, _ = tables()
    sides = {}
    for each in names:
        said = subprocess.run([sys.executable, "-m", "bench.train", each], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if said.returncode:
            sys.exit(f"error: the side {each} ended with status {said.returncode}")
        sides[each] = {key: round(value, 4) for key, value in json.loads(said.stdout.splitlines()[-1]).items()}
        print(f"{each}: {sides[each]}", flush=True)
    versions = {package: version(package) for package in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    results = {
        "machine": {"processor": name, "threads": torch.get_num_threads(), **versions},
        "commit": project_commit(),
        "conversations": len(train),
        "tokens": int(train["length"].sum()),
        "supervised": supervised_tokens(train),
        "sides": sides,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    write_text(PAGE, before + START + table(results) + END + rest.partition(END)[2])
    print(table(results))


if __name__ == "__main__":
    main()

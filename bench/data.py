"""Measure prepare and tokenize at OASST1's full size, beside raw `tokenizers` and a plain `datasets.map` script.

Generates 161,443 messages in 66,497 trees (bench/oasst_size.py), runs both stages on them in a folder of their own, and
compares, in one process and in turns: the stage's tokenisation, `tokenizers.Tokenizer.encode_batch` on the same text,
and `datasets.Dataset.map` with `apply_chat_template` and its mask of the assistant's tokens. Figures are medians.
Run: `python -m bench.data` (5 minutes; needs models/base/); `--repeats`
"""

import argparse
import gc
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from datasets import Dataset, disable_progress_bars
from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerBase

from bench.chat_server import ROOT
from bench.oasst_size import MESSAGES, write_trees
from bench.phi2_full_size import measured
from bench.turns import seconds
from stages.common.artifacts import write_json
from stages.common.model_files import load_tokenizer
from stages.tokenize import load_template, tokenize

SOURCE = "OpenAssistant/oasst1/2023-04-12_oasst_all.trees.jsonl.gz"
MAX_LENGTH = 1024
BATCH = 1000  # texts a call of encode_batch, as `datasets.map` hands out
MAX_SECONDS, MAX_GIB, MIN_OF_RAW = 60, 2.0, 0.8


def make_project(folder: Path) -> None:
    """A folder in which prepare and tokenize run: parameters, templates, the base model's tokenizer, generated data."""
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    yaml = YAML()
    params = yaml.load((ROOT / "recipes/smollm2-cpu.yaml").read_text(encoding="utf-8"))
    params.update(languages=[], max_length=MAX_LENGTH, validation_fraction=0.05)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    (folder / "models").mkdir()
    (folder / "models/base").symlink_to(ROOT / "models/base")
    raw = folder / "data/raw/1"
    raw.mkdir(parents=True)
    write_trees(raw / Path(SOURCE).name, ready_alone=False)
    write_json(raw.parent / "source.json", [{"source": SOURCE, "revision": "0" * 40, "hub": SOURCE, "license": None}])


def ways(
    conversations: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> dict[str, Callable[[], object]]:
    """The ways to tokenise these conversations, by name."""
    talks = [list(messages) for messages in conversations["messages"]]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    raw = tokenizer.backend_tokenizer
    half = conversations.head(len(conversations) // 2)

    def encoded(row: dict) -> dict:
        made = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"][:MAX_LENGTH], "assistant_masks": made["assistant_masks"][:MAX_LENGTH]}

    def mapped() -> None:
        Dataset.from_dict({"messages": talks}).map(encoded, load_from_cache_file=False, cache_file_name=str(cache))

    def by_tokenizers() -> None:
        for start in range(0, len(texts), BATCH):
            for encoding in raw.encode_batch(texts[start : start + BATCH], add_special_tokens=False):
                _ = encoding.ids

    return {
        "stage": lambda: tokenize(conversations, tokenizer, MAX_LENGTH),
        "stage, half of the rows": lambda: tokenize(half, tokenizer, MAX_LENGTH),
        "tokenizers.encode_batch": by_tokenizers,
        "datasets.map": mapped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    if not (ROOT / "models/base/tokenizer.json").is_file():
        sys.exit("error: models/base/ is missing: run `dvc repro` first.")
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"generating {MESSAGES:,} messages", flush=True)
        make_project(folder)
        stages = {name: measured(folder, name) for name in ("prepare", "tokenize")}
        conversations = pd.read_parquet(folder / "data/prepared/train.parquet")
        tokenizer = load_tokenizer(folder / "data/tokenized/tokenizer")
        tokenizer.chat_template = load_template("chatml", tokenizer)
        gc.freeze()  # as at the start of each stage
        found: dict[str, list[float]] = {}
        compared = ways(conversations, tokenizer, folder / "mapped.arrow")
        for _ in range(repeats):
            for name, work in compared.items():
                found.setdefault(name, []).append(seconds(work))
                print(f"{name}: {found[name][-1]:.1f} s", flush=True)
    total, peak = sum(m.seconds for m in stages.values()), max(m.peak for m in stages.values())
    for name, m in stages.items():
        print(f"stage {name}, complete: {m.seconds:.1f} s, peak {m.peak:.2f} GiB")
    print(f"both: {total:.1f} s (at most {MAX_SECONDS}), peak {peak:.2f} GiB (at most {MAX_GIB})")
    medians = {name: statistics.median(times) for name, times in found.items()}
    ratios = {
        f"encode_batch / stage (at least {MIN_OF_RAW})": medians["tokenizers.encode_batch"] / medians["stage"],
        "datasets.map / stage (times faster)": medians["datasets.map"] / medians["stage"],
        "stage, all rows / half of them (2: linear)": medians["stage"] / medians["stage, half of the rows"],
    }
    print(f"\ntokenising {len(conversations):,} conversations, medians of {repeats}:")
    for name, value in ratios.items():
        print(f"  {name:45} {value:.2f}")


if __name__ == "__main__":
    main()

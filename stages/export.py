"""Export the tuned model for CPUs: onnxruntime-genai's format, quantised, checked against the merged model.

Reads models/merged/, models/base/, data/tokenized/ (the held-out part, and for gptq the training part), and for the
cards models/adapter/training.json and data/raw/source.json.
Writes models/onnx/tuned and models/onnx/base (to show both side by side; see params_of), each with its tokenizer, the
chat template of training and card.json; reports/exported.json (what the export cost in quality) and reports/export.json
(the few numbers of it that one compares).
Run: `dvc repro export`
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from stages.common import memory
from stages.common.answers import answer_figures
from stages.common.artifacts import read_json, read_parquet, write_json, write_whole
from stages.common.calibration import (
    Linears,
    check_grids,
    choose_bits,
    costs,
    kept_products,
    products_of,
    round_all,
    sizes_of,
)
from stages.common.chat import Chat, check_same_ids, end_ids, rendered_by
from stages.common.errors import StageError, is_disk_full
from stages.common.exported import Exported
from stages.common.generation import greedy_answers
from stages.common.gptq import Grid
from stages.common.halves import judging
from stages.common.machine import Machine, this_machine
from stages.common.masks import question_of, supervised_tokens
from stages.common.model_files import check_weights, empty_model, load_config, load_tokenizer
from stages.common.models import load_model
from stages.common.nbits import Packed, pack, put_weights
from stages.common.params import load_params
from stages.common.records import read_source, read_sources
from stages.common.schema import ExportParams
from stages.common.scoring import accuracy_of, perplexity_of, score

SOURCES = {"tuned": Path("models/merged"), "base": Path("models/base")}
TOKENIZED = Path("data/tokenized")
COLUMNS = ("input_ids", "assistant_masks", "length", "message_tree_id")  # what is read of a tokenised conversation
TRAINING = Path("models/adapter/training.json")
DATA_SOURCE = Path("data/raw/source.json")
ONNX = Path("models/onnx")
METRICS = Path("reports/export.json")
FIGURES = Path("reports/exported.json")

LARGER = "Run `dvc repro` on a larger machine, where models/merged is (dvc push, dvc pull)."
# Greedy answers on which merged and exported model are compared, token by token.
ANSWERS = 8
ANSWER_TOKENS = 32
BATCH = 8
# Every so many conversations, one of those that calibrate also measures what rounding costs, by a backward pass.
MEASURED = 6
SEED = 0


def matmul_name(layer: int, name: str) -> str:
    """The builder's name of a matrix product."""
    if name == "lm_head":
        return "/lm_head/MatMul"
    return f"/model/layers.{layer}/{'attn' if name in ('qkv_proj', 'o_proj') else 'mlp'}/{name}/MatMul"


def kept_names(params: ExportParams, layers: int) -> list[str]:
    """The builder's names of the products that keep 8 bits, for a model of so many layers."""
    kept = params.export_int8_layers if params.export_precision == "int4" else []
    return list(dict.fromkeys(matmul_name(layer, name) for name in kept for layer in range(layers)))


def quantisation(params: ExportParams, names: Sequence[str], tied: bool) -> dict[str, Any]:
    """The builder's description of how weights are quantised; those of `names` get 8 bits.

    `tied`: its input and output embeddings are one matrix, which is then stored once.
    """
    return {
        "io_dtype": "fp32",
        "weights": {
            "type": params.export_precision,
            "method": "rtn" if params.export_method == "gptq" else params.export_method,
            "block_size": params.export_block_size,
            "symmetric": params.export_symmetric,
            "accuracy_level": params.export_accuracy_level,
            "op_types": ["MatMul", "Gather"] if tied and params.export_precision == "int4" else ["MatMul"],
            "overrides": [{"match": {"name": name}, "type": "int8"} for name in names],
        },
    }


def check_memory(source: Path, machine: Machine) -> None:
    """Raise StageError when the model in float32, which the builder loads, is more than this machine can hold."""
    shape = memory.shape_of(load_config(source))
    needed = memory.LIBRARIES + shape.parameters * memory.dtype_bytes("float32")
    memory.check_room("exporting takes at least", needed, machine.memory, "this machine", LARGER)


def grids_of(params: ExportParams, products: Linears) -> tuple[Grid, Grid]:
    """Of 4 and of 8 bits. 8 bits are so many that longer blocks without zero points lose nothing that matters."""
    block = params.export_block_size
    longer = all(linears[0].in_features % (2 * block) == 0 for linears in products.values())
    return Grid(4, block, params.export_symmetric), Grid(8, 2 * block if longer else block, True)


def calibrate(source: Path, params: ExportParams) -> tuple[list[str], dict[str, Packed]]:
    """The builder's names of the products of `source` that get 8 bits, and the rounded weights of all."""
    rows = read_parquet(TOKENIZED / "train.parquet", ("input_ids", "length"))
    share = max(1, round(rows["length"].sum() / params.export_calibration_tokens))
    conversations = [list(ids) for ids in rows["input_ids"].iloc[::share]]
    model = load_model(source, torch.float32, use_gpu=False).eval().requires_grad_(False)
    products = products_of(model)
    few, many = grids_of(params, products)
    eight = kept_products(products, params.export_int8_layers)
    check_grids(products, (few, many), eight, params.export_bits)
    if params.export_bits is not None:
        cost = costs(model, products, conversations[::MEASURED], few, SEED)
        eight = choose_bits(cost, sizes_of(products), (few, many), eight, params.export_bits)
    grids = {product: many if product in eight else few for product in products}
    rounded = round_all(model, products, conversations, grids)
    packed = {matmul_name(product.layer, product.name): pack(weight, grids[product]) for product, weight in rounded}
    return [matmul_name(product.layer, product.name) for product in products if product in eight], packed


def export(source: Path, folder: Path, params: ExportParams) -> None:
    """Export the model in `source` into `folder`, rounded as the parameters say."""
    packed: dict[str, Packed] = {}
    if params.export_method == "gptq":
        eight, packed = calibrate(source, params)
    else:
        eight = kept_names(params, load_config(source).num_hidden_layers)
    build(source, folder, params, eight)
    if params.export_precision in ("int4", "int8"):
        put_weights(folder, packed)


def build(source: Path, folder: Path, params: ExportParams, eight: Sequence[str]) -> None:
    """Let the builder export the model in `source` into `folder`, which is made; the products named in `eight` get 8
    bits. Raises StageError with the builder's reason.

    It runs in a process of its own: the builder's modules have common names, it prints much, and a process that ends
    returns its memory.
    """
    options = []
    if params.export_precision in ("int4", "int8"):
        model = load_config(source)
        config = {"quant_config": quantisation(params, eight, model.tie_word_embeddings)}
        options = ["--builder_config_version", "2", "--target_options", json.dumps(config)]
    with tempfile.TemporaryDirectory() as cache:
        command = ["-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", str(source), "-o", str(folder)]
        settings = ["-p", params.export_precision, "-e", "cpu", "-c", cache]
        # The builder records the commit of the git repository around it, and would record this project's.
        env = {**os.environ, "GIT_DIR": os.devnull}
        command = [sys.executable, *command, *settings, *options]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        failure = RuntimeError(result.stderr)
        if is_disk_full(failure):
            raise failure
        if result.returncode == -signal.SIGKILL:
            raise StageError(f"the system ended the export of {source}, probably because memory ran out. {LARGER}")
        reason = next(reversed(result.stderr.strip().splitlines()), f"status {result.returncode}")
        raise StageError(
            f"{source} could not be exported as {params.export_precision} ({reason}). "
            "Choose another export_precision or base_model; models/merged is complete; only its export is missing."
        )


def set_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, merged: Path) -> None:
    """Give an exported model the tokenizer, template and special tokens of training, not those of its source.

    Raises StageError where the folder's files, read as the chat app reads them, give other tokens than training saw.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (merged / name).is_file():
            raise StageError(f"{merged / name} is missing. Delete {merged} and run `dvc repro`.")
        shutil.copyfile(merged / name, folder / name)
    config = read_json(folder / "genai_config.json")
    for key in ("bos", "pad"):
        config["model"][f"{key}_token_id"] = getattr(tokenizer, f"{key}_token_id")
    ends = end_ids(tokenizer)
    config["model"]["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(folder / "genai_config.json", config)
    check_same_ids(Chat.of_folder(folder), rendered_by(tokenizer), "the merged model's tokenizer")


def check_loss(increase: float, highest: float) -> None:
    """Raise StageError when the exported model's perplexity rose by more than the share `highest`."""
    if not increase <= highest:
        raise StageError(
            f"the exported model's perplexity is {increase:+.1%} against the merged model's, more than "
            f"export_max_perplexity_increase, {highest:.1%}. Raise export_bits (with export_method: gptq), name more "
            "layers in export_int8_layers, or take export_precision: int8."
        )


def measure(source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: pd.DataFrame) -> dict[str, Any]:
    """What the export of `source` into `folder` cost: on the held-out tokens, and on greedy answers of `source`."""
    # One after the other, so that a large model is not in memory twice.
    model = load_model(source, torch.float32).eval()
    print(f"export: {folder.name}: scoring and answering as it was before", flush=True)
    before = perplexity_of(score(model, rows, BATCH, tokenizer.pad_token_id))
    prompts = [question_of(row) for row in rows.head(ANSWERS).itertuples()]
    answers = greedy_answers(model, tokenizer, prompts, ANSWER_TOKENS, batch_size=ANSWERS)
    del model
    exported = Exported(folder)
    scores = exported.score(rows, f"scoring {folder.name}, exported")
    after = perplexity_of(scores)
    return {
        "perplexity_before": round(before, 4),
        "perplexity": round(after, 4),
        "perplexity_increase": round(after / before - 1, 6),
        "token_accuracy": round(accuracy_of(scores), 6),
        "token_agreement": round(exported.agreement(prompts, answers), 6),
        "bytes": sum(path.stat().st_size for path in folder.glob("model.onnx*")),
    }


def params_of(name: str, params: ExportParams) -> ExportParams:
    """How a model is exported. With gptq the base keeps 8 bits in all layers: it only shows what tuning changed, and is
    not calibrated on what it never saw.
    """
    if name == "tuned" or params.export_method != "gptq":
        return params
    layers = list(dict.fromkeys(product.name for product in products_of(empty_model(load_config(SOURCES[name])))))
    return params.model_copy(update={"export_method": "rtn", "export_bits": None, "export_int8_layers": layers})


def card(name: str, params: ExportParams, quality: dict[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    """Where a model comes from, how it was made and how good it is. A reader may have only the exported folder."""
    training = read_json(TRAINING)
    return {
        "name": name,
        "base_model": read_source(SOURCES["base"] / "source.json"),
        "datasets": read_sources(DATA_SOURCE) if name == "tuned" else [],
        "training": training if name == "tuned" else None,
        "system_prompt": training["params"]["system_prompt"],
        "export": params.model_dump(),
        "held_out": {
            "conversations": len(rows),
            "supervised_tokens": supervised_tokens(rows),
        },
        "quality": quality,
    }


def headline(tuned: dict[str, Any]) -> dict[str, float]:
    """The metrics that DVC shows beside those of evaluate: the exported model's perplexity, and its size in MB."""
    return {"cpu_ppl": tuned["perplexity"], "mb": round(tuned["bytes"] / 1e6, 1)}


def main() -> None:
    params = load_params(ExportParams)
    rows = judging(read_parquet(TOKENIZED / "validation.parquet", COLUMNS))
    tokenizer = load_tokenizer(SOURCES["tuned"])
    names = ["tuned", "base"] if params.export_base else ["tuned"]
    for name in names:
        check_weights(SOURCES[name])
        check_memory(SOURCES[name], this_machine())
    report: dict[str, Any] = {"precision": params.export_precision}
    with write_whole(METRICS) as metrics, write_whole(FIGURES) as figures, write_whole(ONNX) as partial:
        for name in names:
            print(f"export: {name}: {SOURCES[name]}/ to {params.export_precision}", flush=True)
            folder = partial / name
            way = params_of(name, params)
            export(SOURCES[name], folder, way)
            set_tokenizer(folder, tokenizer, SOURCES["tuned"])
            report[name] = measure(SOURCES[name], folder, tokenizer, rows)
            if name == "tuned":
                check_loss(report[name]["perplexity_increase"], params.export_max_perplexity_increase)
                asked = [question_of(row) for row in rows.head(params.stop_prompts).itertuples()]
                ends = end_ids(tokenizer)
                answers = Exported(folder).answers(asked, params.max_new_tokens, ends, params.repetition_penalty)
                report[name]["answers"] = answer_figures(answers, ends)
            write_json(folder / "card.json", card(name, way, report[name], rows))
        tuned = report["tuned"]
        write_json(figures, report)
        write_json(metrics, headline(tuned))
    print(
        f"export: perplexity {tuned['perplexity_before']:.2f} -> {tuned['perplexity']:.2f} "
        f"({tuned['perplexity_increase']:+.1%}), {tuned['token_agreement']:.1%} of greedy tokens the same, "
        f"{tuned['bytes'] / 1e6:.0f} MB -> {ONNX}/"
    )

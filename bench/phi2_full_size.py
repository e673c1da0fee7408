"""Take a Phi of phi-2's exact shape, with random weights, from train to the chat app on a CPU; print peaks and times.

It shows, before anyone rents a GPU, that the reference recipe's code holds at full size: 2.78 billion parameters are
made, quantised, trained for two steps (killed after the first, and resumed), merged, exported and served, each stage
beside the memory that `make plan` would have said. Fails when one holds more than 20 GiB besides mapped weight files,
which the system takes away when it needs the room, or is not within 15 % of its plan.
Nothing is downloaded. Needs 24 GiB of memory and 45 GB of disk under the temporary folder.
Run: `python -m bench.phi2_full_size` (an hour; `--exports` takes a third of it)
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import onnx
import psutil
import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast

from bench.chat_server import chat_server, idle, wait_until
from bench.machine import bytes_a_second
from commands import needs, plan
from stages.common.artifacts import read_json, write_json
from stages.common.memory import GIB
from stages.common.model_files import load_tokenizer
from stages.common.params import read_params
from stages.tokenize import load_template

ROOT = Path(__file__).resolve().parent.parent

PARAMETERS = 2_779_683_840
TOKENS = 256
MAX_MEMORY = 20  # GiB
PROMPT_TOKENS, ANSWER_TOKENS = 500, 32  # of the answer by the exported model
TOLERANCE = 0.15
EXPORTS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4 by gptq": {"export_method": "gptq", "export_bits": 5.0, "export_calibration_tokens": 2048},
}
Row = tuple[str, int, "Measured"]  # what ran, its planned bytes, and what it took
# What is changed in the reference recipe: a CPU's precision, short and few conversations.
CHANGES = {
    "base_model": "file:made-by-this-benchmark",
    "base_model_revision": None,
    "dataset": "file:data/sample/oasst_sample.jsonl",
    "dataset_revision": None,
    "languages": ["en"],
    "validation_fraction": 0.01,
    "max_length": TOKENS,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "max_steps": 2,
    "eval_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "fp16": False,
    "export_base": False,
    "export_max_perplexity_increase": 10.0,  # of random weights it says nothing
}


def make_phi2(folder: Path) -> int:
    """Save a randomly initialised Phi in phi-2's shape, in float16 shards, with a small tokenizer; returns its size."""
    # https://huggingface.co/microsoft/phi-2, config.json
    config = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="2GB")
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=[end], initial_alphabet=alphabet)
    tokenizer.train([str(ROOT / "data/sample/oasst_sample.jsonl")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=end, bos_token=end, eos_token=end).save_pretrained(
        folder
    )
    return sum(parameter.numel() for parameter in model.parameters())


def anonymous(pid: int) -> int:
    """Resident bytes of a process and all below it that are no mapped files."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for member in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory = member.memory_info()
                total += memory.rss - getattr(memory, "shared", 0)
    return total


@dataclass(frozen=True)
class Measured:
    """Peak memory in GiB, with and without mapped files, and time in seconds."""

    peak: float
    anonymous: float
    seconds: float


def measured(project: Path, stage: str, *, kill_when: Path | None = None, must_say: str | None = None) -> Measured:
    """Run a stage in the project, and measure it.

    With `kill_when` it is killed as soon as that file is there. Exits with one line if the stage fails, ends before it
    was to be killed, or does not print `must_say`.
    """
    started, killed, most = time.monotonic(), False, 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen([sys.executable, "-m", "stages", stage], cwd=project, stdout=said)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not killed and kill_when is not None and list(project.glob(str(kill_when))):
                process.send_signal(signal.SIGKILL)
                killed = True
            most = max(most, anonymous(process.pid))
            time.sleep(0.1)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    print(text, end="", flush=True)
    expected = 0 if kill_when is None else -signal.SIGKILL
    if process.returncode != expected:
        sys.exit(f"error: {stage} ended with status {process.returncode}, not {expected}")
    if must_say is not None and must_say not in text:
        sys.exit(f"error: {stage} did not say {must_say!r}")
    return Measured(usage.ru_maxrss / 1024**2, most / GIB, time.monotonic() - started)


def check(rows: list[Row]) -> None:
    """Exit with a line for each stage that passed the bound or whose plan was not within the tolerance."""
    wrong = [
        f"{name}: {m.anonymous:.1f} GiB, more than {MAX_MEMORY}" for name, _, m in rows if m.anonymous > MAX_MEMORY
    ]
    for name, planned, m in rows:
        if abs(planned / GIB / m.peak - 1) > TOLERANCE:
            wrong.append(f"{name}: planned {planned / GIB:.1f} GiB, {m.peak:.1f} measured: not within {TOLERANCE:.0%}")
    if wrong:
        sys.exit("\n".join(f"error: {line}" for line in wrong))


def serve(models: Path, bandwidth: float) -> str:
    """Ask the chat app for an answer after a long question, and leave another; what that took, in a line.

    `bandwidth`: bytes of memory that this machine reads in a second.
    """
    with chat_server(models) as (address, process):
        body = {"messages": [{"role": "user", "content": "egg " * PROMPT_TOKENS}], "stream": True}
        body |= {"max_tokens": ANSWER_TOKENS, "stream_options": {"include_usage": True}}
        began, times, usage = time.monotonic(), [], {}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=600) as response:
            if response.status_code != 200:
                return f"not served: status {response.status_code}"
            for line in response.iter_lines():
                if '"content"' in line:
                    times.append(time.monotonic())
                if '"usage"' in line:
                    ended = time.monotonic()
                    usage = json.loads(line.removeprefix("data: "))["usage"]
        with suppress(httpx.ReadTimeout):  # it leaves while the model reads a question that it has not read yet
            asked = {"messages": [{"role": "user", "content": "And why? " * PROMPT_TOKENS}]}
            httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=1)
        freed = wait_until(lambda: idle(address))
        held = psutil.Process(process.pid).memory_info().rss
    size = sum(path.stat().st_size for path in models.rglob("model.onnx*"))
    limit = bandwidth / bytes_a_token(models / "tuned/model.onnx")
    # Of random weights a token is often a part of a character: fewer pieces than tokens arrive.
    read, speed = usage["prompt_tokens"], (usage["completion_tokens"] - 1) / (ended - times[0])
    return (
        f"{read} tokens read in {times[0] - began:.1f} s ({read / (times[0] - began):.0f} a second), then {speed:.1f} "
        f"tokens/s written, {speed / limit:.2f} of the {limit:.1f} that reading {bandwidth / 1e9:.1f} GB/s allows; "
        f"{held / 1e9:.1f} GB held, {size / 1e9:.1f} of them the model's; a client that left while it read freed it "
        f"after {freed:.2f} s"
    )


def bytes_a_token(model: Path) -> int:
    """Bytes of weights that one token reads: of an embedding's table, it reads one row only."""
    graph = onnx.load(model, load_external_data=False).graph
    looked_up = {name for node in graph.node if node.op_type == "Gather" for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name not in looked_up]
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in tensors
    )


def set_params(project: Path, params: dict[str, Any], **changes: Any) -> dict[str, needs.Peak]:
    """Write the project's params.yaml; what `make plan` would say of it."""
    with (project / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump({**params, **CHANGES, **changes}, file)
    config = plan.configuration(read_json(project / "models/base/config.json"))
    return needs.peaks(config, read_params(project / "params.yaml"), TOKENS)


def trained_and_merged(project: Path, params: dict[str, Any]) -> list[Row]:
    planned = set_params(project, params)
    first = Path("models/checkpoints/*/checkpoint-1/seal.json")
    rows = [("train, killed after step 1", planned["train"].cpu, measured(project, "train", kill_when=first))]
    resumed = measured(project, "train", must_say="resuming from models/checkpoints")
    rows.append(("train, resumed for step 2", planned["train"].cpu, resumed))
    for base in ("original", "dequantized"):
        planned = set_params(project, params, merge_base=base)
        rows.append((f"merge, {base}", planned["merge"].cpu, measured(project, "merge")))
    return rows


def as_merged(project: Path, params: dict[str, Any]) -> None:
    """Take the base for the merged model, as if nothing had been trained."""
    shutil.copytree(project / "models/base", project / "models/merged", copy_function=os.link)
    tokenizer = load_tokenizer(project / "models/base")
    tokenizer.chat_template = load_template(params["chat_template"], tokenizer)
    tokenizer.save_pretrained(project / "models/merged")
    (project / "models/adapter").mkdir(parents=True)
    write_json(project / "models/adapter/training.json", {"params": {"system_prompt": params["system_prompt"]}})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--exports", action="store_true", help="export the base, without training and merging")
    chosen = parser.parse_args()
    rows: list[Row] = []
    served: list[str] = []
    with tempfile.TemporaryDirectory(prefix="phi2-") as folder:
        project = Path(folder)
        for name in ("stages", "space", "data/sample", "recipes", "dvc.yaml", "requirements.lock"):
            source, target = ROOT / name, project / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        params = YAML().load((ROOT / "recipes/phi2-oasst1.yaml").read_text(encoding="utf-8"))
        (project / "models/base").mkdir(parents=True)
        (project / "data/raw/1").mkdir(parents=True)
        shutil.copyfile(project / "data/sample/oasst_sample.jsonl", project / "data/raw/1/oasst_sample.jsonl")
        origin = {"source": "made-by-this-benchmark", "revision": None, "hub": None, "license": None}
        write_json(project / "data/raw/source.json", [origin])
        write_json(project / "models/base/source.json", origin)
        with get_context("spawn").Pool(1) as another_process:  # so that its memory is given back
            size = another_process.apply(make_phi2, [project / "models/base"])
        print(f"bench: a Phi of {size:,} parameters", flush=True)
        if size != PARAMETERS:
            sys.exit(f"error: phi-2 has {PARAMETERS:,}")
        set_params(project, params)
        measured(project, "prepare")
        measured(project, "tokenize")
        if chosen.exports:
            as_merged(project, params)
        else:
            rows += trained_and_merged(project, params)
        bandwidth = bytes_a_second()
        for name, way in EXPORTS.items():
            planned = set_params(project, params, **way)
            rows.append((f"export, {name}", planned["export"].cpu, measured(project, "export")))
            print(f"\nbench: serving, {name}", flush=True)
            served.append(f"{name}: {serve(project / 'models/onnx', bandwidth)}")
    print("\n| stage | planned, GiB | peak memory, GiB | without mapped files, GiB | time, s |")
    print("| --- | --- | --- | --- | --- |")
    for name, need, m in rows:
        print(f"| {name} | {need / GIB:.1f} | {m.peak:.1f} | {m.anonymous:.1f} | {m.seconds:.0f} |")
    print("", *served, sep="\n")
    check(rows)


if __name__ == "__main__":
    main()

"""Take a Phi of phi-2's exact shape, with random weights, from train to export on a CPU; print peaks and times.

It shows, before anyone rents a GPU, that the reference recipe's code holds at full size: 2.78 billion parameters are
made, quantised, trained for two steps (killed after the first, and resumed), merged and exported, each beside the
memory that `make plan` would have said. Fails when train or merge takes more than 20 GiB, or a stage is not within 15 %
of its plan. (onnxruntime-genai's builder takes what it takes: 21 GiB, 5 of them mapped files.)
Nothing is downloaded. Needs 20 GiB of memory and 45 GB of disk under the temporary folder.
Run: `python -m bench.phi2_full_size`
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from ruamel.yaml import YAML

from stages import plan
from stages.common.artifacts import read_json, write_json
from stages.common.memory import GIB
from stages.common.params import read_params

ROOT = Path(__file__).resolve().parent.parent

TOKENS = 256
MOST = 20  # GiB, of train and merge
TOLERANCE = 0.15
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
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast

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


def measured(
    project: Path, module: str, *, kill_when: Path | None = None, must_say: str | None = None
) -> tuple[float, float]:
    """Run `python -m module` in the project; returns its peak memory (GiB) and its time (s).

    With `kill_when` it is killed as soon as that file is there. Exits with one line if the module fails, ends before it
    was to be killed, or does not print `must_say`.
    """
    started, killed = time.monotonic(), False
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen([sys.executable, "-m", module], cwd=project, stdout=said)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not killed and kill_when is not None and list(project.glob(str(kill_when))):
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    print(text, end="", flush=True)
    expected = 0 if kill_when is None else -signal.SIGKILL
    if process.returncode != expected:
        sys.exit(f"error: {module} ended with status {process.returncode}, not {expected}")
    if must_say is not None and must_say not in text:
        sys.exit(f"error: {module} did not say {must_say!r}")
    return usage.ru_maxrss / 1024**2, time.monotonic() - started


def check(rows: list[tuple[str, int, float, float]]) -> None:
    """Exit with a line for each stage that passed the bound or whose plan was not within the tolerance."""
    wrong = [
        f"{name}: {peak:.1f} GiB, more than {MOST}" for name, _, peak, _ in rows if peak > MOST and "export" not in name
    ]
    for name, planned, peak, _ in rows:
        if abs(planned / GIB / peak - 1) > TOLERANCE:
            wrong.append(f"{name}: planned {planned / GIB:.1f} GiB, {peak:.1f} measured: not within {TOLERANCE:.0%}")
    if wrong:
        sys.exit("\n".join(f"error: {line}" for line in wrong))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="phi2-") as folder:
        project = Path(folder)
        for name in ("stages", "data/sample", "recipes", "dvc.yaml", "requirements.lock"):
            source, target = ROOT / name, project / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        yaml = YAML()
        params = yaml.load((ROOT / "recipes/phi2-oasst1.yaml").read_text(encoding="utf-8"))
        with (project / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump({**params, **CHANGES}, file)
        (project / "models/base").mkdir(parents=True)
        (project / "data/raw/1").mkdir(parents=True)
        shutil.copyfile(project / "data/sample/oasst_sample.jsonl", project / "data/raw/1/oasst_sample.jsonl")
        origin = {"source": "made-by-this-benchmark", "revision": None, "license": None}
        write_json(project / "data/raw/source.json", [origin])
        write_json(project / "models/base/source.json", origin)
        with get_context("spawn").Pool(1) as another_process:  # so that its memory is given back
            size = another_process.apply(make_phi2, [project / "models/base"])
        print(f"bench: a Phi of {size:,} parameters", flush=True)
        measured(project, "stages.prepare")
        measured(project, "stages.tokenize")
        first = Path("models/checkpoints/*/checkpoint-1/seal.json")
        config = plan.configuration(read_json(project / "models/base/config.json"))
        planned = plan.peaks(config, read_params(project / "params.yaml"), TOKENS)
        killed = measured(project, "stages.train", kill_when=first)
        rows.append(("train, killed after step 1", planned["train"].cpu, *killed))
        resumed = measured(project, "stages.train", must_say="going on from models/checkpoints")
        rows.append(("train, resumed for step 2", planned["train"].cpu, *resumed))
        for base in ("original", "dequantized"):
            with (project / "params.yaml").open("w", encoding="utf-8") as file:
                yaml.dump({**params, **CHANGES, "merge_base": base}, file)
            planned = plan.peaks(config, read_params(project / "params.yaml"), TOKENS)
            rows.append((f"merge, {base}", planned["merge"].cpu, *measured(project, "stages.merge")))
        rows.append(("export, int4", planned["export"].cpu, *measured(project, "stages.export")))
    print("\n| stage | planned, GiB | peak memory, GiB | time, s |\n| --- | --- | --- | --- |")
    for name, need, peak, seconds in rows:
        print(f"| {name} | {need / GIB:.1f} | {peak:.1f} | {seconds:.0f} |")
    check(rows)


if __name__ == "__main__":
    main()

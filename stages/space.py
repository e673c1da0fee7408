"""Put the chat app together as a Hugging Face Space: a folder that runs alone, made from the pipeline's outputs.

Reads space/, models/onnx/, LICENSE and models/base/ (its licence); writes build/space/: the app, its pinned packages,
the exported models, licences, and README.md, the Space's card.
Run: `make space`; try it there: `pip install -r requirements.txt`, `python app.py`
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from stages.common.artifacts import read_json, write_text, write_whole
from stages.common.errors import StageError, run_stage

APP = Path("space")
ONNX = Path("models/onnx")
BASE = Path("models/base")
LICENCE = Path("LICENSE")
SPACE = Path("build/space")
PYTHON = "3.11"


def project_commit() -> str:
    """The commit of the project that the folder is made from; `-dirty` where files were changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def gradio_version(requirements: str) -> str:
    """The version of Gradio that the app's requirements pin: a Space's card must name it, too."""
    pinned = re.search(r"^gradio==(\S+)$", requirements, re.MULTILINE)
    if pinned is None:
        raise StageError(f"{APP}/requirements.txt does not pin gradio==…")
    return pinned[1]


def space_card(card: dict[str, Any], gradio: str, commit: str, model_repository: str | None) -> str:
    """The Markdown of the Space's README, with the front matter that the hub reads; `card` is the tuned model's."""
    base, quality = card["base_model"], card["quality"]
    on_hub = [source for source in (model_repository, base["source"]) if source and ":" not in source]
    models = "models:\n" + "".join(f"- {name}\n" for name in on_hub) if on_hub else ""
    repositories = ["/".join(d["source"].split("/")[:2]) for d in card["datasets"] if ":" not in d["source"]]
    datasets = "datasets:\n" + "".join(f"- {name}\n" for name in dict.fromkeys(repositories)) if repositories else ""
    data = "; ".join(
        f"`{d['source']}`{' at `' + d['revision'] + '`' if d['revision'] else ''}, "
        f"licence {d['license'] or 'not stated'}"
        for d in card["datasets"]
    )
    steps = card["training"]["params"]["max_steps"]
    return f"""---
title: QLoRA chat
emoji: 💬
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: "{PYTHON}"
app_file: app.py
license: {base["license"] or "other"}
{models}{datasets}pinned: false
short_description: A small fine-tuned chat model on a CPU
---
# QLoRA chat

A chat page and an OpenAI-style API for a language model that was fine-tuned by QLoRA, on a CPU.

| | |
| --- | --- |
| Base model | `{base["source"]}` at `{base["revision"]}`, licence {base["license"] or "not stated"} |
| Data | {data} |
| Training | {steps} steps on {card["training"]["train_conversations"]} conversations |
| Export | {card["export"]["export_precision"]}, perplexity {quality["perplexity"]:.2f} on held-out answers \
({quality["perplexity_before"]:.2f} before the export) |
| Made from | commit `{commit}` of the project |

Everything else about the models is in `model/tuned/card.json` and `model/base/card.json`. The app: Apache-2.0
(`LICENSE`); the models: the licence of their base. To run it elsewhere: `pip install -r requirements.txt`, then
`python app.py`.
"""


def build_space(model_repository: str | None = None) -> Path:
    """Make build/space/ anew and return it; `model_repository` (owner/name) is linked in its card."""
    if not (ONNX / "tuned/card.json").is_file():
        raise StageError(f"{ONNX}/tuned holds no exported model. Run `make all` to make it.")
    if not (APP / "app.py").is_file():
        raise StageError(f"{APP}/app.py is missing.")
    requirements = (APP / "requirements.txt").read_text(encoding="utf-8")
    card = read_json(ONNX / "tuned/card.json")
    text = space_card(card, gradio_version(requirements), project_commit(), model_repository)
    with write_whole(SPACE) as folder:
        shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copytree(ONNX, folder / "model")
        shutil.copyfile(LICENCE, folder / "LICENSE")
        for licence in BASE.glob("LICENSE*"):
            shutil.copyfile(licence, folder / "model" / licence.name)
        write_text(folder / "README.md", text)
    return SPACE


def main() -> None:
    folder = build_space()
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"space: {len(files)} files, {size / 1e6:.0f} MB -> {folder}/")
    print(f"Try it: cd {folder} && pip install -r requirements.txt && python app.py")
    print("Publish it: make deploy SPACE=you/name")


if __name__ == "__main__":
    run_stage(main)

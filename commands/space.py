"""Put the chat app together as a Hugging Face Space: a folder that runs alone, made from the pipeline's outputs.

Reads space/, models/onnx/, LICENSE and models/base/ (its licence); writes build/space/: the app, its packages with all
that they need, pinned, the exported models, licences, and README.md, the Space's card. What `make deploy` publishes has
instead of the models a pin to the model repository (models.json).
Run: `make space`; try it there: `pip install -r requirements.txt`, `python app.py`
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stages.common.artifacts import read_json, write_json, write_text, write_whole
from stages.common.errors import StageError, run_stage

APP = Path("space")
ONNX = Path("models/onnx")
BASE = Path("models/base")
LICENCE = Path("LICENSE")
SPACE = Path("build/space")
PUBLISHED = Path("build/published-space")
PYTHON = "3.11"
INSIDE = "onnx"  # where the model repository has the exported models; see space/find_models.py


@dataclass(frozen=True)
class Pin:
    """A model repository of the hub, at a commit."""

    repository: str
    revision: str


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


def pinned_closure(requirements: str) -> str:
    """The lines `package==version` of these requirements and of all that they need in a Space, whatever runs here.

    The versions are the installed ones, those of requirements.lock. Raises StageError for a package that is not there.
    """
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux"}
    there |= {"platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    direct = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    waiting = [(Requirement(line), "") for line in direct]
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while waiting:
        needed, extra = waiting.pop()
        if needed.marker and not needed.marker.evaluate({**there, "extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        try:
            pins[name] = f"{name}=={version(name)}"
        except PackageNotFoundError:
            raise StageError(f"{name} is not installed, which the chat app needs. Run `make setup`.") from None
        for wanted in {"", *needed.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, wanted))
            waiting += [(Requirement(text), wanted) for text in requires(name) or []]
    head = "# What the chat app imports, and all that it needs, at the versions it was tested with.\n"
    return head + "\n".join(sorted(pins.values())) + "\n"


def space_card(card: dict[str, Any], gradio: str, commit: str, pin: Pin | None, files: Sequence[str] = ()) -> str:
    """The Markdown of the Space's README, with the front matter that the hub reads; `card` is the tuned model's.

    `files` of the repository `pin` are in the Space's cache before it starts.
    """
    base, quality = card["base_model"], card["quality"]
    on_hub = [source for source in (pin and pin.repository, base["source"]) if source and ":" not in source]
    preload = f"preload_from_hub:\n- {pin.repository} {','.join(files)} {pin.revision}\n" if pin else ""
    where = f"[{pin.repository}](https://huggingface.co/{pin.repository})/{INSIDE}" if pin else "`model`"
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
{models}{datasets}{preload}pinned: false
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

Everything else about the models is in {where}, in `tuned/card.json` and `base/card.json`. The app: Apache-2.0
(`LICENSE`); the models: the licence of their base. To run it elsewhere: `pip install -r requirements.txt`, then
`python app.py`.
"""


def build_space(pin: Pin | None = None) -> Path:
    """Make build/space/, with the exported models, or build/published-space/, with a pin to the repository that has
    them, anew; returns it."""
    target = SPACE if pin is None else PUBLISHED
    if not (ONNX / "tuned/card.json").is_file():
        raise StageError(f"{ONNX}/tuned holds no exported model. Run `make all` to make it.")
    if not (APP / "app.py").is_file():
        raise StageError(f"{APP}/app.py is missing.")
    requirements = (APP / "requirements.txt").read_text(encoding="utf-8")
    card, commit = read_json(ONNX / "tuned/card.json"), project_commit()
    files = sorted(f"{INSIDE}/{path.relative_to(ONNX).as_posix()}" for path in ONNX.rglob("*") if path.is_file())
    with write_whole(target) as folder:
        shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copyfile(LICENCE, folder / "LICENSE")
        if pin is None:
            shutil.copytree(ONNX, folder / "model")
            for licence in BASE.glob("LICEN*"):
                shutil.copyfile(licence, folder / "model" / licence.name)
        else:
            write_json(folder / "models.json", asdict(pin))
        write_text(folder / "requirements.txt", pinned_closure(requirements))
        write_text(folder / "commit.txt", f"{commit}\n")
        write_text(folder / "README.md", space_card(card, gradio_version(requirements), commit, pin, files))
    return target


def main() -> None:
    folder = build_space()
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"space: {len(files)} files, {size / 1e6:.0f} MB -> {folder}/")
    print(f"Try it: cd {folder} && pip install -r requirements.txt && python app.py")
    print("Publish it: make deploy SPACE=you/name")


if __name__ == "__main__":
    run_stage(main)

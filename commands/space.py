"""Put the chat app together as a Hugging Face Space: a folder that runs alone, made from the pipeline's outputs.

Reads space/, models/onnx/, reports/evaluation.json, LICENSE and models/base/ (its licence); writes build/space/: the
app, its packages with all that they need, pinned, the exported models, their evaluation, licences, and README.md, the
Space's card. What `make deploy` publishes has instead of the models a pin to the model repository (models.json).
Run: `make space`; try it there: `pip install -r requirements.txt`, `python app.py`
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from commands.commit import project_commit
from stages.common.artifacts import read_json, write_json, write_text, write_whole
from stages.common.cards import hub_datasets
from stages.common.errors import StageError
from stages.common.params import read_params

APP = Path("space")
ONNX = Path("models/onnx")
BASE = Path("models/base")
LICENCE = Path("LICENSE")
EVALUATION = Path("reports/evaluation.json")
CARD = Path(__file__).parent / "cards/space.md"
SPACE = Path("build/space")
PUBLISHED = Path("build/published-space")
PYTHON = "3.11"
INSIDE = "onnx"  # where the model repository has the exported models; see space/chatapp/server/find_models.py


@dataclass(frozen=True)
class Pin:
    """A model repository of the hub, at a commit."""

    repository: str
    revision: str


def gradio_version(requirements: str) -> str:
    """The version of Gradio that the app's requirements pin: a Space's card must name it, too."""
    pinned = re.search(r"^gradio==(\S+)$", requirements, re.MULTILINE)
    if pinned is None:
        raise StageError(f"{APP}/requirements.txt does not pin gradio==…. Restore it: `git checkout {APP}`.")
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
            raise StageError(
                f"{name} is not installed, which the chat app needs. Run `rm .venv/installed`, then `make setup`."
            ) from None
        for wanted in {"", *needed.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, wanted))
            waiting += [(Requirement(text), wanted) for text in requires(name) or []]
    head = "# What the chat app imports, and all that it needs, at the versions it was tested with.\n"
    return head + "\n".join(sorted(pins.values())) + "\n"


def space_card(card: dict[str, Any], gradio: str, commit: str, pin: Pin | None, files: Sequence[str] = ()) -> str:
    """The Markdown of the Space's README, with the front matter that the hub reads; `card` is the tuned model's.

    `files` of the repository `pin` are in the Space's cache before it starts.
    """
    base = card["base_model"]
    preload = [f"{pin.repository} {','.join(files)} {pin.revision}"] if pin else None
    data = SpaceCardData(
        title="QLoRA chat",
        emoji="💬",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=gradio,
        python_version=PYTHON,
        app_file="app.py",
        license=base["license"] or "other",
        models=[name for name in (pin and pin.repository, base["hub"]) if name] or None,
        datasets=hub_datasets(card["datasets"]),
        preload_from_hub=preload,
        pinned=False,
        short_description="A small fine-tuned chat model on a CPU",
    )
    where = f"[{pin.repository}](https://huggingface.co/{pin.repository})/{INSIDE}" if pin else "`model`"
    filled = {**card, "base": base, "commit": commit, "where": where}
    return f"{SpaceCard.from_template(data, template_path=str(CARD), **filled)}\n"


def build_space(pin: Pin | None = None) -> Path:
    """Make build/space/, with the exported models, or build/published-space/, with a pin to the repository that has
    them, again; returns it."""
    target = SPACE if pin is None else PUBLISHED
    if not (ONNX / "tuned/card.json").is_file():
        raise StageError(f"{ONNX}/tuned holds no exported model. Run `make all` to make it.")
    if not (APP / "app.py").is_file():
        raise StageError(f"{APP}/app.py is missing. Restore it: `git checkout {APP}`.")
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
        if EVALUATION.is_file():
            shutil.copyfile(EVALUATION, folder / EVALUATION.name)
        write_text(folder / "README.md", space_card(card, gradio_version(requirements), commit, pin, files))
    return target


def main() -> None:
    read_params()
    folder = build_space()
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"space: {len(files)} files, {size / 1e6:.0f} MB -> {folder}/")
    print(f"Try it: cd {folder} && pip install -r requirements.txt && python app.py")
    print("Publish it: make deploy SPACE=you/name")

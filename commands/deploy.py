"""Publish the model and the chat app on the Hugging Face hub: a model repository and a Space, both called user/name.

Reads models/merged/, models/adapter/, models/onnx/, models/gguf/, reports/ and what build/space/ is made from. The
Space takes its models from the model repository, at the commit that was just published: the hub limits the size of a
Space's own files.
Files that the hub already has are not sent again: a second deploy of the same content sends nothing, and a deploy that
was interrupted continues.
Run: `make deploy SPACE=user/name`; with `DRY=1` it only lists what would go.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from jinja2 import Template

from commands.lockfile import LOCK, read_lock
from commands.space import BASE, ONNX, Pin, build_space
from stages.common.artifacts import read_json, write_json, write_text, write_whole
from stages.common.cards import model_card
from stages.common.errors import StageError, first_line
from stages.common.params import PARAMS, read_params
from stages.common.records import read_source, read_sources
from stages.common.schema import MergeParams

MERGED = Path("models/merged")
ADAPTER = Path("models/adapter")
GGUF = Path("models/gguf")
RAW_SOURCE = Path("data/raw/source.json")
REPORTS = [
    Path("reports") / name for name in ("evaluation.json", "exported.json", "gguf.json", "samples.json", "samples.md")
]
CARD = Path(__file__).parent / "cards/hub.md"
MODEL = Path("build/model")
# This file marks a repository that a deploy made; its other files are replaced.
MARKS = {"model": "onnx/tuned/card.json", "space": "models.json"}
UNPUBLISHED = "0" * 40  # the commit in a dry run's Space


def build_model(repository: str) -> Path:
    """Make and return build/model/: the merged model, its ONNX and GGUF forms, the adapter, the reports, a card."""
    for folder in (MERGED, ADAPTER, ONNX / "tuned"):
        if not folder.is_dir():
            raise StageError(f"{folder} is missing. Run `make all` to make it.")
    on_hub = read_source(BASE / "source.json")["hub"]
    with write_whole(MODEL) as folder:
        # Links, not copies: a large model would be on the disk twice.
        shutil.copytree(MERGED, folder, copy_function=_link)
        shutil.copytree(ONNX, folder / "onnx", copy_function=_link)
        shutil.copytree(ADAPTER, folder / "adapter", copy_function=_link)
        if GGUF.is_dir() and any(GGUF.iterdir()):
            shutil.copytree(GGUF, folder / "gguf", copy_function=_link)
        for licence in BASE.glob("LICEN*"):
            shutil.copyfile(licence, folder / licence.name)
        for report in REPORTS:
            if report.is_file():
                (folder / report.parent).mkdir(exist_ok=True)
                _link(str(report), str(folder / report))
        # Elsewhere a folder of this project names no base model.
        config = read_json(ADAPTER / "adapter_config.json")
        write_json(folder / "adapter/adapter_config.json", {**config, "base_model_name_or_path": on_hub})
        datasets, training = read_sources(RAW_SOURCE), read_json(ADAPTER / "training.json", ["params"])
        card = model_card(training, read_source(BASE / "source.json"), datasets, merged_with(), repository)
        files = sorted(path.name for path in (folder / "gguf").glob("*.gguf"))
        modelfile = (folder / "gguf/Modelfile").is_file()
        write_text(folder / "README.md", hub_card(card, repository, files, modelfile))
    return MODEL


def hub_card(card: str, repository: str, gguf: list[str], modelfile: bool) -> str:
    """The merged model's card for the repository, and how to run the other files there: the GGUF files of these names,
    with Ollama's Modelfile or without."""
    template = Template(CARD.read_text(encoding="utf-8"))
    return template.render(card=card, repository=repository, gguf=gguf, modelfile=modelfile) + "\n"


def merged_with() -> dict[str, Any]:
    """merge's parameters of the recorded run: those in params.yaml may be newer. Raises StageError without a record."""
    recorded = read_lock().get("merge", {}).get("params", {}).get(str(PARAMS), {})
    if lacking := [key for key in MergeParams.model_fields if key not in recorded]:
        raise StageError(f"{LOCK} has no {lacking[0]} of merge. Run `make all` to record the run.")
    return {key: recorded[key] for key in MergeParams.model_fields}


def _link(source: str, target: str) -> None:
    os.symlink(os.path.abspath(source), target)


def listing(repository: str, kind: str, folder: Path) -> list[str]:
    """What would be published in a repository: a line for each file, with its size in MB."""
    files = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in _files(folder))
    total = sum(size for _, size in files)
    head = f"{kind} {repository}: {len(files)} files, {total / 1e6:.1f} MB"
    return [head, *(f"  {size / 1e6:9.3f} MB  {name}" for name, size in files)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn what the hub and the network refuse into one line that says how to fix it. It never holds a token."""
    log_in = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
    try:
        yield
    except LocalTokenNotFoundError:
        raise StageError(f"there is no token for the hub. {log_in}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise StageError(f"the hub does not accept the token. {log_in}") from None
        if status == 403:
            said = getattr(error, "server_message", None) or "no reason given"
            raise StageError(f"the token may not write to {repository} ({said}). {log_in}") from None
        raise StageError(f"{repository}: the hub refused ({first_line(error)}). Run it again to continue.") from None
    except OfflineModeIsEnabled:
        raise StageError("HF_HUB_OFFLINE is set: nothing can be published. Unset it.") from None
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: an upload broke
        raise StageError(
            f"{repository}: the connection to the hub failed ({first_line(error)}). Run it again to continue."
        ) from None


def publish(api: HfApi, repository: str, kind: str, folder: Path) -> str:
    """Create the repository ("model" or "space") if it is missing, and replace its content by `folder`, in one commit.

    Returns its commit after that.
    """
    with explained(repository):
        api.create_repo(repository, repo_type=kind, space_sdk="gradio" if kind == "space" else None, exist_ok=True)
        before = api.repo_info(repository, repo_type=kind).sha
        names = set(api.list_repo_files(repository, repo_type=kind))
        if names - {".gitattributes", "README.md"} and MARKS[kind] not in names:
            raise StageError(
                f"{kind} {repository} was not made by a deploy, and would lose its files. "
                "Choose another name: make deploy SPACE=user/name"
            )
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"Deploy {kind}",
            delete_patterns="*",  # files of an earlier deploy that this one lacks
        )
        after = api.repo_info(repository, repo_type=kind).sha
    state = "as it was" if before == after else f"now at {after}"
    print(f"deploy: {kind} {repository} is {state}", flush=True)
    return str(after)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy")
    parser.add_argument("repository", nargs="?", default="")
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    read_params()
    chosen = options()
    name = chosen.repository
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise StageError(f"name the repository: make deploy SPACE=user/name ({first_line(error)})") from None
    if "/" not in name:
        raise StageError(f"name the repository: make deploy SPACE=user/name (not {name!r})")
    model = build_model(name)
    if chosen.dry:
        for kind, folder in {"model": model, "space": build_space(Pin(name, UNPUBLISHED))}.items():
            print("\n".join(listing(name, kind, folder)))
        return

    api = HfApi()
    with explained(name):
        print(f"deploy: as {api.whoami()['name']}", flush=True)
    revision = publish(api, name, "model", model)
    publish(api, name, "space", build_space(Pin(name, revision)))
    print(f"The page: {api.endpoint}/spaces/{name}   The model: {api.endpoint}/{name}")

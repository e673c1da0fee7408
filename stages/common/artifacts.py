"""Writing outputs completely or not at all, and always the same bytes for the same content."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.errors import DISK_FULL, StageError, first_line, is_disk_full


@contextmanager
def write_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; move what was made there into place only if the block succeeds.

    The block creates the path itself, as a file or as a folder. The temporary names are fixed, so that the next run
    removes what a killed run left.
    """
    partial, old = (target.with_name(f".{target.name}.{what}partial") for what in ("", "old."))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if target.is_dir():  # a rename cannot replace a folder
            _remove(old)
            target.rename(old)
        partial.replace(target)
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, StageError):
            raise StageError(f"{target}: {DISK_FULL}") from error
        raise
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        _remove(partial)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON with keys in the order given: readers see a report in this order."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, keys: Sequence[str] = ()) -> Any:
    """Read a JSON file that an earlier stage wrote. Raises StageError when it is missing, damaged or lacks a key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing. Run `dvc repro` to make it.") from None
    except (OSError, ValueError) as error:
        raise StageError(f"{path} is not valid JSON ({error}). Delete it and run `dvc repro`.") from None
    if keys and not isinstance(content, dict):
        raise StageError(f"{path} holds no JSON object. Delete it and run `dvc repro`.")
    _refuse_gaps(path, [key for key in keys if key not in content])
    return content


def read_parquet(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a parquet file that an earlier stage wrote. Raises StageError when it is missing, damaged or incomplete."""
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise StageError(f"{path} is missing. Run `dvc repro` to make it.") from None
    except Exception as error:  # pyarrow raises errors of its own
        raise StageError(f"{path} cannot be read ({first_line(error)}). Delete it and run `dvc repro`.") from None
    _refuse_gaps(path, [column for column in columns if column not in table])
    if columns and table.empty:
        raise StageError(f"{path} has no rows. Delete it and run `dvc repro`.")
    return table


def _refuse_gaps(path: Path, missing: list[str]) -> None:
    if missing:
        raise StageError(
            f"{path} has no {', '.join(missing)}: it is not as its stage writes it. Delete it and run `dvc repro`."
        )


def digest_files(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of files and folders (hex), independent of the project's folder."""
    total = hashlib.sha256()
    for root in paths:
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for file in files:
            name = file.relative_to(root.parent).as_posix()
            total.update(f"{sha256_file(file)}  {name}\n".encode())
    return total.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

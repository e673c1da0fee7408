"""Data files -> rows: JSON lines, plain or gzipped, and parquet. A format is an entry of FORMATS."""

import codecs
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow.parquet import ParquetFile

from stages.common.errors import StageError, first_line

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
PARQUET_BATCH = 1000  # rows in memory at a time


class Format(NamedTuple):
    """How files with an ending are read."""

    ending: str
    place: str  # what a row is called in an error line
    read: Callable[[Path], Iterator[tuple[int, Row | str]]]  # see `read_rows`


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder, by name. Raises StageError when there is none."""
    files = sorted(path for path in folder.glob("*") if path.name.endswith(tuple(form.ending for form in FORMATS)))
    if not files:
        *others, last = (form.ending for form in FORMATS)
        raise StageError(f"{folder} holds no {', '.join(others)} or {last} file. Check `dataset` in params.yaml.")
    return files


def format_of(file: Path) -> Format:
    """The format of one of the `data_files`."""
    return next(form for form in FORMATS if file.name.endswith(form.ending))


def read_rows(file: Path) -> Iterator[tuple[int, Row | str]]:
    """Number (from 1) and content of each row of a data file; for a row that cannot be read, the reason (a string).

    Raises StageError that names the file when the rest of it cannot be read.
    """
    try:
        yield from format_of(file).read(file)
    except Exception as error:  # gzip, zlib and pyarrow have exceptions of their own
        raise StageError(
            f"{file.name} cannot be read ({first_line(error)}). Is it damaged? "
            "Put a complete file there, then `dvc repro`."
        ) from None


def split_of(name: str) -> str | None:
    """The split that a file's name starts with, or None."""
    return next((split for split in SPLITS if name.startswith(split)), None)


def _read_parquet(file: Path) -> Iterator[tuple[int, Row | str]]:
    batches = ParquetFile(file).iter_batches(PARQUET_BATCH)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row | str]]:
    with file.open("rb") as lines:
        yield from _parse_lines(lines)


def _read_jsonl_gz(file: Path) -> Iterator[tuple[int, Row | str]]:
    with gzip.open(file) as lines:
        yield from _parse_lines(lines)


def _parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Row | str]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)


def parse_line(line: bytes) -> Row | str:
    """The JSON object on a line, or what is wrong with the line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        beginning = line[:30].decode("utf-8", "replace").strip()
        return f"not valid JSON ({error.msg}); it begins with {beginning!r}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested too deep
        return f"not JSON that can be read ({first_line(error)})"
    return row if isinstance(row, dict) else "not a JSON object"


FORMATS = (
    Format(".jsonl", "line", _read_jsonl),
    Format(".jsonl.gz", "line", _read_jsonl_gz),
    Format(".parquet", "row", _read_parquet),
)

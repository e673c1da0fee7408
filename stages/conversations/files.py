"""Data files -> rows. A format is an entry of FORMATS; .gz and .zst are unpacked while reading."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from stages.common.errors import StageError, first_line

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | str]]  # see `read_rows`
# What the words of a file's path say of its split. The first that is found in this order holds.
SPLIT_WORDS = {
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "train": ("train",),
}
PARQUET_BATCH = 1000  # rows in memory at a time
# What `datasets` and the hub's client write beside data.
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
MAX_CELL = 2**31 - 1  # characters in a cell of a CSV file
DELIMITERS = (",", ";", "\t")
# Names, without their endings, of the files that describe data.
DESCRIPTIONS = ("readme", "license", "licence", "copying", "notice", "changelog", "citation", "authors", "datasheet")


class Format(NamedTuple):
    """How files with an ending are read."""

    ending: str
    place: str  # what a row is called in an error line
    read: Callable[[Path], Rows]


def data_files(folder: Path, source: str | None = None) -> list[Path]:
    """The data files of a folder and its subfolders, by path. Raises StageError, which names the folder or the data
    set's `source`, when there is none."""
    files = [path for path in _files(folder) if _is_data(path)]
    if not files:
        *others, last = (form.ending for form in FORMATS)
        raise StageError(
            f"{source or folder} holds no {', '.join(others)} or {last} file. Check `dataset` in params.yaml."
        )
    return files


def unread_files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders that may hold data, but have no known ending, by path."""
    return [path for path in _files(folder) if not _is_data(path) and not _is_beside_data(path)]


def _files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, by path; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return sorted(path for path in found if path.is_file())


def _is_beside_data(path: Path) -> bool:
    """Whether a file is known to hold no rows: a description, a pointer of DVC, or what libraries write beside data."""
    if path.suffix == ".arrow" and path.name.startswith("cache-"):  # `datasets` caches its computations there
        return True
    described = path.name.lower().split(".")[0] in DESCRIPTIONS
    return path.name in NO_DATA or path.suffix in (".dvc", ".lock") or described and _format(path) is None


def _is_data(path: Path) -> bool:
    return _format(path) is not None and not _is_beside_data(path)


def name_in(file: Path, folder: Path) -> str:
    """A data file's path inside its folder."""
    return file.relative_to(folder).as_posix()


def known_as(name: str, source: str | None) -> str:
    """A data file, by its name in data/raw/…, as the user knows it: its own path, or the source that it is from."""
    if source is None:
        return name
    if not source.startswith("file:"):
        return f"{source}: {name}"
    path = Path(source.removeprefix("file:"))
    return str(path if path.name == name else path / name)


def format_of(file: Path) -> Format:
    """The format of one of the `data_files`."""
    found = _format(file)
    assert found is not None
    return found


def _format(file: Path) -> Format | None:
    return next((form for form in FORMATS if file.name.lower().endswith(form.ending)), None)


def read_rows(file: Path, name: str) -> Rows:
    """Number (from 1) and content of each row of a data file; for a row that cannot be read, the reason (a string).

    `name` is the file in error lines. Raises StageError when the rest of the file cannot be read.
    """
    try:
        yield from format_of(file).read(file)
    except UnicodeError as error:
        raise StageError(f"{name} is not UTF-8 ({first_line(error)}). Save it as UTF-8, then `dvc repro`.") from None
    except Exception as error:  # gzip, zlib and pyarrow have exceptions of their own
        raise StageError(
            f"{name} cannot be read ({first_line(error)}). Is it damaged? Put a complete file there, then `dvc repro`."
        ) from None


def split_of(name: str) -> str | None:
    """The split that a file's path states in a word of its own, or None. The file's own name goes first."""
    for part in reversed(Path(name).parts):
        words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])\d+", "", part.lower()))
        for split, names in SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return None


# Bytes -----------------------------------------------------------------------------------------------------------


def _open(file: Path) -> IO[bytes]:
    """A file's unpacked bytes, without the byte order mark of UTF-8. Raises UnicodeError for UTF-16."""
    raw: IO[bytes] = file.open("rb")
    if file.suffix.lower() == ".gz":
        raw = gzip.open(raw)  # type: ignore[assignment]
    elif file.suffix.lower() == ".zst":
        raw = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
    stream = io.BufferedReader(raw)  # type: ignore[type-var]
    beginning = stream.peek(4)[:4]
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff") or beginning[:2].count(0) == 1:
        raise UnicodeError("it is UTF-16")
    if beginning.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
    return stream


# Formats ---------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path) -> Rows:
    batches = ParquetFile(file).iter_batches(PARQUET_BATCH)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _read_arrow(file: Path) -> Rows:
    """A file of a `save_to_disk` folder: a stream of Arrow batches."""
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
        parts = (batch.slice(i, PARQUET_BATCH) for batch in batches for i in range(0, len(batch), PARQUET_BATCH))
        yield from enumerate((row for part in parts for row in part.to_pylist()), 1)


def _read_jsonl(file: Path) -> Rows:
    with _open(file) as lines:
        yield from _parse_lines(lines)


def _parse_lines(lines: Iterable[bytes]) -> Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse_line(line)


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


def _read_json(file: Path) -> Rows:
    """An array of objects, or an object whose only list is one; lines of JSON often have this ending, too."""
    with _open(file) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8"))
    except json.JSONDecodeError:
        lines = content.splitlines()
        if not lines or content.lstrip().startswith(b"[") or isinstance(parse_line(lines[0]), str):
            raise
        yield from _parse_lines(lines)
        return
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        wrapped = len(lists) == 1 and not {"messages", "conversations", "conversation", "chosen"} & rows.keys()
        rows = lists[0] if wrapped else [rows]
    if not isinstance(rows, list):
        raise ValueError("it is neither an array of objects nor lines of objects")
    yield from ((number, row if isinstance(row, dict) else "not a JSON object") for number, row in enumerate(rows, 1))


def _read_csv(file: Path, delimiters: Sequence[str] = DELIMITERS) -> Rows:
    """A table with a header. An empty cell is None."""
    csv.field_size_limit(MAX_CELL)
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        header = text.readline()
        delimiter = max(delimiters, key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])
        for number, cells in enumerate(csv.reader(text, delimiter=delimiter, strict=True), 1):
            if len(cells) > len(names):
                yield number, f"it has {len(cells)} cells, the header has {len(names)}"
            elif cells:
                cells += [""] * (len(names) - len(cells))
                yield number, {name: cell or None for name, cell in zip(names, cells, strict=True)}


PACKED = ("", ".gz", ".zst")
FORMATS = (
    *(Format(f"{ending}{packed}", "line", _read_jsonl) for ending in (".jsonl", ".ndjson") for packed in PACKED),
    *(Format(f".json{packed}", "row", _read_json) for packed in PACKED),
    *(Format(f".csv{packed}", "row", _read_csv) for packed in PACKED),
    *(Format(f".tsv{packed}", "row", partial(_read_csv, delimiters=("\t",))) for packed in PACKED),
    Format(".parquet", "row", _read_parquet),
    Format(".arrow", "row", _read_arrow),
)

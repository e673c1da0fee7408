"""Fields of a message row -> flags and numbers.

CSV has only text, so that a value may be spelled as in JSON. What cannot be read is named, never taken as missing.
"""

import json
from collections.abc import Callable
from typing import Any

from stages.conversations.files import Row
from stages.conversations.turns import NOTHING, yes_or_no

MAX_NUMBER = 1e300  # Python's integers may be too large for a float
MAX_SHOWN = 40  # characters of a value in an error line


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: null, NaN, an empty text or an empty list."""
    return value is None or value != value or value == [] or isinstance(value, str) and value.strip() in NOTHING


def shown(value: Any) -> str:
    """A value as an error line shows it: its beginning, in printable characters."""
    return ascii(value)[:MAX_SHOWN]


def read_field(row: Row, name: str, read: Callable[[Any], Any], problems: list[str], default: Any = None) -> Any:
    """A field by one of the functions below; `default` where it is missing. What is wrong goes to `problems`."""
    value = row.get(name)
    if is_missing(value):
        return default
    try:
        return read(value)
    except ValueError as error:
        problems.append(f"{name} is {shown(value)}, {error}")
        return default


def as_flag(value: Any) -> bool:
    """True or False for a value of YES_NO. Raises ValueError for another one, and so do the others."""
    found = yes_or_no(value)
    if found is None:
        raise ValueError("neither true nor false")
    return found


def as_number(value: Any) -> float | None:
    """A number, or the text of one; None where it is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    try:
        found = float(value)
    except OverflowError:
        return None
    except ValueError:
        raise ValueError("not a number") from None
    return found if abs(found) < MAX_NUMBER else None


def quality_of(labels: Any) -> float | None:
    """The label `quality`, as nested trees ({quality: {value, count}}) or flat rows ({name: [], value: []}) have it."""
    labels = _object(labels)
    found = labels.get("quality")
    if found is None:
        names, values = labels.get("name"), labels.get("value")
        if isinstance(names, list) and isinstance(values, list):
            found = next((value for name, value in zip(names, values, strict=False) if name == "quality"), None)
    return _part("quality", found.get("value") if isinstance(found, dict) else found)


def toxicity_of(detoxify: Any) -> float | None:
    """The score `toxicity` of Detoxify."""
    return _part("toxicity", _object(detoxify).get("toxicity"))


def _object(value: Any) -> Row:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("not an object of JSON") from None
    if isinstance(value, dict):
        return value
    raise ValueError("not an object of JSON")


def _part(name: str, value: Any) -> float | None:
    try:
        return None if is_missing(value) else as_number(value)
    except ValueError as error:
        raise ValueError(f"of which {name} is {error}") from None

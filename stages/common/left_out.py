"""What stages say of the data that they leave out: a table for the console, a warning for a step that takes much."""

from collections.abc import Sequence

MUCH = 0.1  # a step that takes a larger share of what was read is a warning


def aligned(rows: Sequence[Sequence[object]], stage: str) -> list[str]:
    """The lines of a table whose first column is text and whose others are figures; the first row is its heading."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    return [f"{stage}: {line}".rstrip() for line in lines]


def is_much(part: int, whole: int) -> bool:
    return part > MUCH * whole


def left_out_warning(
    stage: str, step: str, part: int, whole: int, parameter: str | None, what: str = "messages"
) -> str:
    """What a step took, and the parameter that governs it."""
    governed = f"The parameter `{parameter}` governs it." if parameter else "docs/data.md explains it."
    return f"warning: {stage}: {step} took {part:,} of {whole:,} {what} ({part / whole:.0%}). {governed}"

"""Draw when each of 32 clients that ask at once sees its first word: the chat app of now, and of an earlier commit.

Writes docs/first-words.png. Needs the package matplotlib (`pip install matplotlib`) and the outputs of `make all`.
`git worktree add build/before COMMIT` gives the earlier one.
Run: `python -m bench.first_words build/before/space/app.py`
"""

import argparse
import asyncio
import importlib
from pathlib import Path

from bench.chat_server import APP, ROOT, chat_server
from bench.load import at_once
from bench.machine import processor

PICTURE = ROOT / "docs/first-words.png"
CLIENTS, TOKENS = 32, 64


def first_words(app: Path) -> list[float]:
    """Seconds until the first word of each client's answer, in order."""
    with chat_server(ROOT / "models/onnx", app=app) as (address, _):
        asyncio.run(at_once(address, 1, 8))  # the first answer is slower
        answers, _ = asyncio.run(at_once(address, CLIENTS, TOKENS))
    return sorted(answer.first for answer in answers)


def draw(sides: dict[str, list[float]], picture: Path) -> None:
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for (name, times), marker in zip(sides.items(), "so", strict=False):
        axes.plot(range(1, len(times) + 1), times, marker, label=f"{name}: last after {times[-1]:.1f} s")
    axes.set(xlabel="clients that ask at once, in the order of their first word", ylabel="first word after, s")
    axes.set_title(f"Answers of at most {TOKENS} tokens, {processor()}", fontsize=9)
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="space/app.py of an earlier commit")
    sides = {"before": first_words(parser.parse_args().before), "now": first_words(APP)}
    draw(sides, PICTURE)
    for name, times in sides.items():
        print(f"{name}: first words after {times[0]:.1f} to {times[-1]:.1f} s")


if __name__ == "__main__":
    main()

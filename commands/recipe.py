"""Put a recipe in place of params.yaml, keeping what was there if it was edited.

Run: `make recipe NAME=phi2-oasst1` (or `python -m commands recipe phi2-oasst1`)
"""

import itertools
import sys
from pathlib import Path

from stages.common.artifacts import write_text
from stages.common.errors import StageError
from stages.common.params import PARAMS, read_params, read_values

RECIPES = Path("recipes")


def switch(name: str) -> str:
    """Copy recipes/`name`.yaml over params.yaml; return what to print. Raises StageError, changing nothing."""
    chosen = RECIPES / f"{name}.yaml"
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if chosen.stem not in names:
        raise StageError(f"there is no recipe {name!r}. NAME is one of: {', '.join(names)}")
    read_params(chosen)
    recipe = chosen.read_text(encoding="utf-8")
    said = f"params.yaml is now the recipe {name}. Next: dvc repro"
    if PARAMS.exists():
        current = PARAMS.read_text(encoding="utf-8")
        if edited(PARAMS):
            places = (RECIPES / ("previous" + (f"-{n}" if n > 1 else "") + ".yaml") for n in itertools.count(1))
            kept = next(place for place in places if not place.exists())
            write_text(kept, current)
            said += f"\nYour edited params.yaml is saved as {kept}: make recipe NAME={kept.stem} brings it back."
    write_text(PARAMS, recipe)
    return said


def edited(path: Path) -> bool:
    """Whether a parameter file has other values than each recipe. (Comments do not count: DVC rewrites the file.)"""
    try:
        values = read_values(path)
    except StageError:
        return True
    return all(values != read_values(recipe) for recipe in RECIPES.glob("*.yaml"))


def main() -> None:
    if len(sys.argv) != 2:
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise StageError(f"name a recipe: make recipe NAME=…, one of: {names}")
    print(switch(sys.argv[1]))

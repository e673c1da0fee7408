"""Put a recipe in place of params.yaml, keeping what was there if it was edited.

Run: `make recipe NAME=phi2-oasst1` (or `python -m stages.recipe phi2-oasst1`)
"""

import itertools
import sys
from pathlib import Path

from stages.common.artifacts import write_text
from stages.common.errors import StageError, run_stage
from stages.common.params import PARAMS, read_params

RECIPES = Path("recipes")


def switch(name: str) -> str:
    """Copy recipes/`name`.yaml over params.yaml; return what to tell the user. Raises StageError, changing nothing."""
    chosen = RECIPES / f"{name}.yaml"
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if chosen.stem not in names:
        raise StageError(f"there is no recipe {name!r}. NAME is one of: {', '.join(names)}")
    read_params(chosen)
    recipe = chosen.read_text(encoding="utf-8")
    said = f"params.yaml is now the recipe {name}. Next: dvc repro"
    if PARAMS.exists():
        current = PARAMS.read_text(encoding="utf-8")
        if all(current != path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml")):
            places = (RECIPES / ("previous" + (f"-{n}" if n > 1 else "") + ".yaml") for n in itertools.count(1))
            kept = next(place for place in places if not place.exists())
            write_text(kept, current)
            said += f"\nYour edited params.yaml is kept: make recipe NAME={kept.stem} brings it back."
    write_text(PARAMS, recipe)
    return said


def main() -> None:
    if len(sys.argv) != 2:
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise StageError(f"say which recipe: make recipe NAME=…, one of: {names}")
    print(switch(sys.argv[1]))


if __name__ == "__main__":
    run_stage(main)

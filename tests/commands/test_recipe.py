"""Switching recipes: what was edited is saved, and a file that only lost its comments is not edited."""

import re

import pytest
from dvc.utils.hydra import apply_overrides

from commands.recipe import edited
from tests.support.project import RECIPE, ROOT


def test_a_file_that_only_lost_its_comments_is_not_edited(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path, text = tmp_path / "params.yaml", RECIPE.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    apply_overrides(path, ["max_steps=11"])
    assert edited(path)
    apply_overrides(path, ["max_steps=80"])
    assert not edited(path)
    path.write_text(re.sub(r"(^| )#.*", "", text, flags=re.MULTILINE), encoding="utf-8")
    assert "#" not in path.read_text(encoding="utf-8") and not edited(path)
    path.write_text("seed: [1", encoding="utf-8")
    assert edited(path)  # a broken file is a person's work, too


@pytest.mark.slow
def test_recipes_are_switched_without_losing_edits(project):
    params, recipes = project.folder / "params.yaml", project.folder / "recipes"
    # Without its comments it has the same values: nothing is lost with it.
    params.write_text(re.sub("#.*", "", params.read_text(encoding="utf-8")), encoding="utf-8")
    project.run("commands", "recipe", "phi2-oasst1")
    assert params.read_bytes() == (ROOT / "recipes/phi2-oasst1.yaml").read_bytes()
    assert not (recipes / "previous.yaml").exists()
    project.set(seed=7)
    edited = params.read_bytes()
    said = project.run("commands", "recipe", "smollm2-cpu").stdout
    assert "make recipe NAME=previous" in said
    project.run("commands", "recipe", "previous")
    assert params.read_bytes() == edited
    project.set(seed=8)
    assert "make recipe NAME=previous-2" in project.run("commands", "recipe", "smollm2-cpu").stdout
    project.run("commands", "recipe", "previous")
    refused = project.run("commands", "recipe", "nonsense", check=False)
    assert (
        refused.returncode == 1
        and "one of: phi2-oasst1, phi2-oasst1-best, previous, previous-2, smollm2-cpu" in refused.stderr
    )
    assert params.read_bytes() == edited

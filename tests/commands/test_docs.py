"""What `make docs` writes: nothing is stale, every difference has its reason, and DVC's rewriting loses no comment."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from commands import docs
from stages.common.errors import StageError
from stages.common.params import read_values
from stages.common.schema import SECTIONS, Params
from tests.support.params import OTHER_VALUES
from tests.support.project import RECIPE, ROOT, ships

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAIRS = [(recipe, key) for recipe in RECIPES for key in Params.model_fields]
# Another list of each key that may be one.
LISTS: dict[str, list[Any]] = {
    "dataset": ["owner/one", "owner/two"],
    "dataset_revision": ["0" * 40, None],
    "dataset_weights": [0.5, 2.0],
    "tree_states": ["growing", "aborted_low_grade"],
    "languages": ["de", "pt-BR"],
    "target_modules": ["q_proj", "v_proj"],
    "sample_prompts": ["Hello: how are you?", "Why?"],
    "export_int8_layers": ["fc1", "lm_head"],
    "gguf_types": ["Q8_0", "F16"],
}


@pytest.fixture
def generated(monkeypatch) -> dict[Path, str]:
    monkeypatch.chdir(ROOT)
    return docs.generated()


def test_make_docs_has_nothing_to_write(generated):
    names = {"params.yaml", "dvc.yaml", "parameters.md", *(path.name for path in RECIPES)}
    assert {path.name for path in generated} == names
    for path, text in generated.items():
        if path.name != "params.yaml":  # its values are the user's: see the next test
            assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} is stale: run `make docs`"


@ships
def test_the_comments_of_params_yaml_are_not_stale(generated):
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == generated[Path("params.yaml")]


@pytest.mark.slow
def test_check_names_what_is_stale_and_writes_nothing(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copyfile(RECIPE, tmp_path / "params.yaml")
    for name in ("stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["docs"])
    docs.main()
    recipe = tmp_path / "recipes/phi2-oasst1.yaml"
    before = recipe.read_text(encoding="utf-8")
    edited = before.replace("# Rank of the LoRA matrices.", "# Rank.")
    assert edited != before
    recipe.write_text(edited, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["docs", "--check"])
    with pytest.raises(StageError, match=r"stale: recipes/phi2-oasst1.yaml. Run `make docs`."):
        docs.main()
    assert recipe.read_text(encoding="utf-8") == edited
    monkeypatch.setattr("sys.argv", ["docs"])
    docs.main()
    assert recipe.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_value_that_differs_from_the_reference_has_a_reason(recipe):
    text = recipe.read_text(encoding="utf-8")
    values, reference = read_values(recipe), read_values(ROOT / f"recipes/{docs.REFERENCE}.yaml")
    different = {key for key in values if values[key] != reference[key]}
    assert docs.reasons(text).keys() == different
    assert "why?" not in text
    # A new difference without a reason is marked, so that this test finds it.
    changed = text.replace("seed: 42", "seed: 43")
    assert "Reference: 42; why?" in docs.annotated(changed, reference)


def test_a_new_key_gets_its_default_and_its_stage_in_dvc_yaml(monkeypatch):
    """A filter, say, needs its field alone: `make docs` writes the rest."""
    text, reference = RECIPE.read_text(encoding="utf-8"), read_values(RECIPE)
    lacking = re.sub(r"# Decoupled weight decay.\nweight_decay: .*\n", "", text)
    assert lacking != text
    with pytest.raises(StageError, match="weight_decay: give the field a default, or each recipe a value"):
        docs.annotated(lacking, reference)
    monkeypatch.setattr(Params.model_fields["weight_decay"], "default", 0.25)
    assert "# Decoupled weight decay.\n# Reference: 0.0; why?\nweight_decay: 0.25\n" in docs.annotated(
        lacking, reference
    )
    pipeline = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    without = pipeline.replace("    - weight_decay\n", "")
    assert without != pipeline and docs.declared(without) == pipeline
    assert docs.declared(pipeline.replace("    - lora_r\n", "    - lora_r\n    - gone\n")) == pipeline


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "params.yaml"], ids=lambda path: path.stem)
def test_no_comment_behind_a_key_runs_over_the_width(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if " # " in line and len(line) > docs.MAX_WIDTH]
    assert not long, "shorten the reason behind Reference, or the description of the field"


def test_a_long_description_behind_a_key_is_cut_and_its_note_is_kept():
    note = "Reference: 5; a reason"
    for more in range(20):  # wherever the width falls, a word is complete
        line = docs.beside(f"key: {'1' * (more + 1)}", ["Several complete words, " * 20, note])
        assert docs.MAX_WIDTH - len("complete words, ") < len(line) <= docs.MAX_WIDTH
        assert re.search(rf" (Several|complete|words)… {note}$", line), line
    assert docs.beside("key: 1", ["Short.", note]) == f"key: 1 # Short. {note}"
    assert docs.beside(f"key: {'v' * 80}", ["A description.", note]) == f"key: {'v' * 80} # {note}"
    assert docs.beside(f"key: {'v' * 120}", ["A description."]) == f"key: {'v' * 120} # …"


def test_a_note_has_a_complete_value_or_names_the_recipe_that_has_it():
    reference = {"seed": 42, "system_prompt": "A prompt of many words. " * 3}
    assert docs.comment_of("seed", 1, reference, "so")[1] == "Reference: 42; so"
    said = docs.comment_of("system_prompt", "", reference, "so")[1]
    assert said == "Reference: see recipes/phi2-oasst1.yaml; so"


def test_every_key_is_once_on_the_page_of_parameters():
    page = (ROOT / "docs/parameters.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \|", page, re.MULTILINE).count("parameter") == len(SECTIONS)
    assert [key for key in re.findall(r"^\| (\w+) \|", page, re.MULTILINE) if key != "parameter"] == [
        key for keys in docs.sections().values() for key in keys
    ]


# DVC's rewriting: `dvc exp run -S key=value` ---------------------------------------------------------------------


def written(value: Any) -> str:
    """A value as Hydra's grammar of `-S key=value` takes it."""
    if isinstance(value, list):
        return f"[{','.join(written(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return str(value)
    quoted = value.replace("'", "\\'")
    return f"'{quoted}'"


def others(key: str, now: Any) -> list[Any]:
    """Other valid values of a key, at least one, lists among them where it may be a list."""
    (single,) = [values[key] for values in OTHER_VALUES.values() if key in values]
    if isinstance(now, bool):
        single = not now
    if key == "threads":
        single = {"best": "all", "all": "best"}[now]
    assert single != now, key
    return [single, *([LISTS[key]] if key in LISTS else []), *([[]] if docs.may_be_empty(key) and now else [])]


def without(text: str, key: str) -> list[str]:
    """A parameter file's lines without those of a key's value; a folded text is one line, wherever it is folded."""
    unfolded = re.sub(r" ?\n  (?=\S)", " ", text)
    return re.sub(rf"^{key}:.*\n(- .*\n)*", f"{key}:\n", unfolded, flags=re.MULTILINE).splitlines()


def comments(text: str) -> list[str]:
    return sorted(re.findall(r"(?:^|\s)(# .*)$", text, re.MULTILINE))


def overridden(path: Path, key: str, value: Any) -> str:
    apply_overrides(path, [f"{key}={written(value)}"])
    text = path.read_text(encoding="utf-8")
    (block,) = re.finditer(rf"^{key}:.*\n((- |  ).*\n)*", text, re.MULTILINE)
    assert YAML(typ="safe").load(block[0])[key] == value  # reading the complete file each time would take minutes
    return text


def test_the_lists_are_those_that_the_schema_allows():
    assert LISTS.keys() == {key for key in Params.model_fields if docs.may_be_a_list(key)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dvc_changes_one_key_and_loses_no_comment(recipe, tmp_path):
    """For every key: to another value, and where it may be one to a list, and back from it."""
    path, before = tmp_path / "params.yaml", recipe.read_text(encoding="utf-8")
    for key, now in read_values(recipe).items():
        path.write_text(before, encoding="utf-8")
        for value in [*others(key, now), *([now] if key in LISTS else [])]:
            after = overridden(path, key, value)
            assert without(after, key) == without(before, key), f"{key}={value}"
            assert comments(after) == comments(before), f"{key}={value}"


@pytest.mark.slow
def test_dvc_changes_several_keys_one_after_the_other_and_loses_no_comment(tmp_path):
    path, before = tmp_path / "params.yaml", RECIPE.read_text(encoding="utf-8")
    path.write_text(before, encoding="utf-8")
    changed = {}
    for key, now in read_values(RECIPE).items():
        changed[key] = others(key, now)[-1]
        overridden(path, key, changed[key])
    assert read_values(path) == changed
    assert comments(path.read_text(encoding="utf-8")) == comments(before)

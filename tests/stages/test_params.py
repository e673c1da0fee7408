"""params.yaml: the schema, its messages, and that DVC's picture of who reads what is true."""

import re

import pytest
from dvc.repo import Repo

from commands.docs import sections
from stages.common.errors import StageError
from stages.common.params import load_params, read_params, section_of
from stages.common.pipeline import read_pipeline
from stages.common.schema import SECTIONS, FetchParams, MergeParams, Params
from tests.support.params import OTHER_VALUES
from tests.support.project import RECIPE, ROOT, ships

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PIPELINE = read_pipeline(ROOT)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    """Chat templates are looked up in the project's folder."""
    monkeypatch.chdir(ROOT)


def edited(tmp_path, *lines: str):
    """A copy of the shipped params.yaml with lines put at its end (YAML refuses a key twice, so drop the old one)."""
    text = RECIPE.read_text(encoding="utf-8")
    for line in lines:
        key = line.split(":")[0]
        text = re.sub(rf"^{key}:.*\n([- ] .*\n)*", "", text, flags=re.MULTILINE)
    path = tmp_path / "params.yaml"
    path.write_text(text + "".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@ships
def test_shipped_parameters_are_the_embedded_recipe():
    assert (ROOT / "params.yaml").read_bytes() == RECIPE.read_bytes()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_comments_every_key(recipe):
    read_params(recipe)
    lines = recipe.read_text(encoding="utf-8").splitlines()
    keys = [(i, line.split(":")[0]) for i, line in enumerate(lines) if re.match(r"\w+:", line)]
    expected = [key for keys_of_stage in sections().values() for key in keys_of_stage]
    assert [key for _, key in keys] == expected  # all there, in the order of the stages
    for i, key in keys:
        beside = f"{lines[i]}{lines[i + 1] if lines[i].endswith(' ') else ''}"
        assert lines[i - 1].startswith("# ") or " # " in beside, f"{recipe.name}: no comment at {key}"


def test_reference_recipe_has_the_reference_values():
    params = read_params(ROOT / "recipes/phi2-oasst1.yaml").model_dump()
    expected = {
        "base_model": "microsoft/phi-2",
        "base_model_revision": "ef382358ec9e382308935a992d908de099b64c23",
        "dataset": "OpenAssistant/oasst1",
        "dataset_revision": "fdf72ae0827c1cda404aff25b6603abec9e3399b",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "optim": "paged_adamw_32bit",
        "save_steps": 10,
        "logging_steps": 10,
        "learning_rate": 2e-4,
        "max_grad_norm": 0.3,
        "max_steps": 500,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "fp16": True,
        "bf16": False,
        "gradient_checkpointing": True,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "dense"],
    }
    assert {key: params[key] for key in expected} == expected


@pytest.mark.parametrize("text", ["1e-05", "1e-5", "1.0E-5", "0.00001"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text):
    assert read_params(edited(tmp_path, f"learning_rate: {text}")).learning_rate == 0.00001


@pytest.mark.parametrize(
    "line, said",
    [
        ("dataset: 5", "dataset: 5: must be a valid string or must be a valid list"),
        ("dataset: [a/b, c/d]", "dataset_revision: None: 2 sources need as many values of the revision, not 1"),
        ("dataset_weights: [1.0, 2.0]", "dataset_weights: 2 for 1 data sets: give one for each, or null"),
        ("dataset_weights: [0.0]", "dataset_weights.0: 0.0: must be greater than 0"),
    ],
)
def test_lists_of_data_sets_are_checked(tmp_path, line, said):
    with pytest.raises(StageError) as error:
        read_params(edited(tmp_path, line))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "lines, said",
    [
        (["fp16: true", "bf16: true"], "fp16, bf16: both true"),
        (["min_turns: 3", "max_turns: 2"], "max_turns: 2: must be at least min_turns, 3"),
        (["load_in_4bit: false", "merge_base: dequantized"], "merge_base: 'dequantized': needs load_in_4bit"),
        (["chat_template: none"], "none.jinja does not exist; use one of: chatml, phi2, model"),
        (["max_steps: 3", "logging_steps: 4"], "logging_steps: 4: must be at most max_steps, 3"),
        (["max_steps: 3", "save_steps: 5"], "save_steps: 5: must be at most max_steps, 3"),
        (["base_model_revision: main"], "base_model_revision: 'main': the revision of"),
        (["base_model: nonsense"], "base_model: 'nonsense': 'nonsense' must be owner/name of the hub"),
        (["target_modules: [q_proj, q_proj]"], "target_modules: ['q_proj', 'q_proj']: names something twice"),
        (["languages: [en, en]"], "languages: ['en', 'en']: names something twice"),
        (["tree_states: [x, x]"], "tree_states: ['x', 'x']: names something twice"),
        (["sample_prompts: [x, x]"], "sample_prompts: ['x', 'x']: names something twice"),
        (["export_method: rtn"], "export_bits: 6.16: needs export_method: gptq"),
        (["export_precision: int8"], "export_method: 'gptq': needs export_precision: int4; for int8 use rtn"),
        (["export_int8_layers: [fc1, fc1]"], "export_int8_layers: ['fc1', 'fc1']: names something twice"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path, lines, said):
    with pytest.raises(StageError, match=re.escape(said)):
        read_params(edited(tmp_path, *lines))


@pytest.mark.parametrize(
    "line, said",
    [
        ("lerning_rate: 0.1", "lerning_rate: is not a parameter; did you mean learning_rate?"),
        ("lora_rank: 4", "lora_rank: is not a parameter; did you mean lora_r?"),
        ("colour: blue", "colour: is not a parameter; docs/parameters.md lists all"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_name(tmp_path, line, said):
    with pytest.raises(StageError, match=re.escape(said)):
        read_params(edited(tmp_path, line))


def test_all_problems_are_reported_at_once_one_line_each(tmp_path):
    with pytest.raises(StageError) as error:
        read_params(edited(tmp_path, "learning_rate: -1", "lora_r: 0", "colour: blue", "fp16: true", "bf16: true"))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all(any(key in line for line in lines) for key in ("learning_rate", "lora_r", "colour", "bf16"))


def test_a_missing_key_and_broken_yaml_are_named(tmp_path):
    path = tmp_path / "params.yaml"
    text = RECIPE.read_text(encoding="utf-8")
    path.write_text(text.replace("lora_r: 16\n", ""), encoding="utf-8")
    with pytest.raises(StageError, match="lora_r: is missing"):
        read_params(path)
    path.write_text(text + "lora_r: 8\n", encoding="utf-8")
    with pytest.raises(StageError, match="duplicate key"):
        read_params(path)
    path.write_text("seed: [1\n", encoding="utf-8")
    with pytest.raises(StageError, match="line .* is not valid YAML"):
        read_params(path)


def test_each_section_is_what_its_stage_declares_in_dvc_yaml():
    assert list(SECTIONS) == list(PIPELINE)
    for stage, section in SECTIONS.items():
        assert list(section.model_fields) == PIPELINE[stage]["params"], stage


def test_load_params_shows_a_stage_no_other_key():
    params = load_params(MergeParams)
    assert list(params.model_dump()) == PIPELINE["merge"]["params"]
    with pytest.raises(AttributeError):
        _ = params.learning_rate
    assert section_of(read_params(RECIPE).model_dump(), MergeParams).merge_dtype == "float16"


def test_a_wrong_value_of_a_later_stage_stops_the_first(tmp_path, monkeypatch):
    templates = tmp_path / "stages/templates"
    templates.parent.mkdir()
    templates.symlink_to(ROOT / "stages/templates")
    monkeypatch.chdir(tmp_path)
    edited(tmp_path)
    assert load_params(FetchParams).dataset == "file:data/sample/oasst_sample.jsonl"
    edited(tmp_path, "export_block_size: 17")
    with pytest.raises(StageError, match="export_block_size: 17: must be 16, 32, 64 or 128"):
        load_params(FetchParams)
    edited(tmp_path, "min_turns: 3", "max_turns: 2")
    with pytest.raises(StageError, match="must be at least min_turns"):
        load_params(FetchParams)


def test_every_key_belongs_to_a_stage_and_dvc_yaml_keeps_one_order():
    declared = [key for stage in PIPELINE.values() for key in stage["params"]]
    assert set(declared) == set(Params.model_fields)
    order = ["cmd", "deps", "params", "outs", "metrics", "plots"]
    for stage in PIPELINE.values():
        assert list(stage) == [key for key in order if key in stage]


@pytest.mark.slow
def test_each_key_reruns_its_stages_and_no_others(finished_project, monkeypatch):
    assert sorted(k for keys in OTHER_VALUES.values() for k in keys) == sorted(Params.model_fields)
    monkeypatch.chdir(finished_project.folder)
    assert Repo().status() == {}
    path = finished_project.folder / "params.yaml"
    before = path.read_bytes()
    finished_project.set(**{key: value for keys in OTHER_VALUES.values() for key, value in keys.items()})
    stages_of: dict[str, list[str]] = {}
    for stage, (changed,) in Repo().status().items():
        assert list(changed) == ["changed deps"] and list(changed["changed deps"]) == ["params.yaml"]
        for key in changed["changed deps"]["params.yaml"]:
            stages_of.setdefault(key, []).append(stage)
    assert {key: set(stages) for key, stages in stages_of.items()} == {
        key: set(stages.split()) for stages, keys in OTHER_VALUES.items() for key in keys
    }
    # A comment and a docstring are no change.
    path.write_bytes(b"# another comment\n" + before)
    code = finished_project.folder / "stages/common/params.py"
    code.write_text(code.read_text(encoding="utf-8").replace('"""', '"""Another word. ', 1), encoding="utf-8")
    assert Repo().status() == {}

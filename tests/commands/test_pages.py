"""The pages are true: files, links, figures and parameters that they name are there."""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from commands.summary import exported, table
from stages.common.artifacts import read_json
from stages.common.schema import Params
from tests.support.pages import EXAMPLES, PAGES, README, blocks, prose, text_of
from tests.support.project import PIPELINE, ROOT, STAGES, outputs_of, ships

MAX_README_BYTES = 9000
# Files that a page asks a reader to make, or that a command makes; and examples.
MADE = ("build/", "models/checkpoints", "recipes/previous", "stages/templates/NAME.jinja")


def outputs() -> set[str]:
    return {path for stage in STAGES for path in outputs_of(stage)}


def is_there(name: str) -> bool:
    made = outputs()
    path = name.rstrip("/")
    return (
        (ROOT / path).exists()
        or any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in made)
        or path.startswith(MADE)
        or f"{path}/".startswith(MADE)
        or path in EXAMPLES
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    folders = "stages|commands|space|bench|tests|data|models|reports|recipes|docs|build"
    named = re.findall(rf"`((?:{folders})(?:/[\w.*{{}},-]+)*/?)`", prose(page))
    for block in blocks(page, "bash"):
        named += re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+)", block)
    missing = [name for name in named if "/" in name and not is_there(name)]
    assert not missing, f"{page.relative_to(ROOT)} names what is not there: {missing}"


def test_the_tree_of_folders_in_the_readme_is_the_one_that_is_there():
    (tree,) = [block for block in blocks(README, "text") if "dvc.yaml  " in block]
    parent = ""
    for line in tree.splitlines():
        for name in re.findall(r"[\w./]+", re.split(r" {2,}(?=\S)", line.strip())[0]):
            if line.startswith("  "):
                assert (ROOT / parent / name).is_dir(), line
            else:
                parent = name
                assert is_there(name), line


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.relative_to(ROOT)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{page.relative_to(ROOT)}: {target}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", text_of(README)))
    assert linked == {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_parameters_in_examples_are_there(page):
    for block in blocks(page, "yaml"):
        assert YAML(typ="safe").load(block).keys() <= Params.model_fields.keys(), block


def test_the_readme_is_two_screens():
    assert README.stat().st_size <= MAX_README_BYTES


def test_every_stage_is_in_the_readme_and_opens_with_how_to_run_it():
    for stage in PIPELINE:
        assert f"**{stage}**" in text_of(README)
        docstring = (ROOT / f"stages/{stage}.py").read_text(encoding="utf-8").split('"""')[1]
        assert f"`dvc repro {stage}`" in docstring


@ships
def test_the_figures_in_the_readme_are_those_in_git():
    readme, metrics = text_of(README), read_json(ROOT / "reports/metrics.json")
    conversations = pd.read_csv(ROOT / "reports/conversations.csv")
    lines = [f"{metrics['ppl']:>10.2f}", f"held-out conversations, {conversations['tokens'].sum()} tokens"]
    lines.append(f"measured on {len(conversations)} of ")
    if (ROOT / "reports/evaluation.json").exists():  # kept by DVC, not by git
        found = read_json(ROOT / "reports/exported.json")
        lines += [line.rstrip() for line in table(read_json(ROOT / "reports/evaluation.json"), found)]
        lines.append(exported(found))
    for line in lines:
        assert line in readme, f"README.md does not show: {line}"
    export = read_json(ROOT / "reports/export.json")
    assert f"{export['mb']:.0f} MB, perplexity {export['cpu_ppl']:.2f}" in readme


def test_nothing_names_a_machine_or_a_package_host():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if path.suffix in {".jsonl", ".png"} or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and "index-url" not in text, name

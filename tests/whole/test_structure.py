"""The structure of the code: arrows run one way, dvc.yaml names the code that shapes outputs, everything is small."""

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stages.common.pipeline import read_pipeline
from tests.support.project import ROOT

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 6
PACKAGES = ("stages", "commands", "space", "bench", "tests")

PIPELINE = read_pipeline(ROOT)

# Functions that import, and why.
MAY_IMPORT = {("space/app.py", "main"): "it imports only as much as its command needs"}

# Modules that shape no output: a change in them reruns no stage.
SHAPES_NO_OUTPUT = {
    "stages.common.artifacts": "writes and reads what it is given; its format is part of no stage's logic",
    "stages.common.entry": "sets the environment and reports failures",
    "stages.common.errors": "words of failures",
    "stages.common.experiments": "a stage may refuse because of it, and computes nothing else because of it",
    "stages.common.left_out": "words for the console",
    "stages.common.locks": "waits",
    "stages.common.machine": "a stage may refuse because of the machine, and computes nothing else because of it",
    "stages.common.memory": "a stage may refuse because of it, and computes nothing else because of it",
    "stages.common.model_files": "checks files, and reads them as transformers does",
    "stages.common.params": "DVC watches the values themselves",
    "stages.common.pipeline": "reads dvc.yaml",
    "stages.common.records": "reads and checks source.json",
    "stages.common.schema": "DVC watches the values themselves",
}

# Requirements that no file imports.
NOT_IMPORTED = {
    "aiobotocore": "a lower bound, without which pip tries old releases of dvc-s3 for minutes",
    "dvc-s3": "a plug-in of DVC: remotes on S3",
    "flask-cors": "moto's server imports it",
    "mypy": "a command-line tool",
    "onnx-ir": "onnxruntime-genai's builder imports it",
    "pytest-timeout": "a plug-in of pytest",
    "pytest-xdist": "a plug-in of pytest",
    "ruff": "a command-line tool",
}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """A file's module name; the chat app's files are imported from their own folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "space":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in files(*PACKAGES)}


def imported_names(path: Path) -> set[str]:
    """Every dotted name that a file imports; of `from a import b` both `a` and `a.b`."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@cache
def imports_of(module: str) -> frozenset[str]:
    """The project's modules that a module imports. A package counts where something is taken from its own file."""
    names = imported_names(MODULES[module])
    found = set()
    for name in names & MODULES.keys():
        inside = any(other.startswith(f"{name}.") and other in MODULES for other in names)
        if name != module and not (inside and MODULES[name].name == "__init__.py"):
            found.add(name)
    return frozenset(found)


def closure(module: str, without: set[str] | frozenset[str] = frozenset()) -> set[str]:
    """All that a module imports, directly or not, and itself; nothing is followed through `without`."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in without:
            seen.add(name)
            waiting += imports_of(name)
    return seen


# Arrows -----------------------------------------------------------------------------------------------------------


def test_no_module_imports_itself_by_way_of_others():
    for module in MODULES:
        behind = set().union(*(closure(other) for other in imports_of(module)))
        assert module not in behind, f"{module} is in a circle of imports: {sorted(imports_of(module))}"


def forbidden(module: str) -> tuple[str, ...]:
    """The packages and modules that a module may not import."""
    stages = tuple(f"stages.{name}" for name in PIPELINE if f"stages.{name}" != module)
    if module == "stages.common.exported":  # an exported model is measured by the app's own decoder and choice
        return (*stages, "stages.conversations", "commands", "bench", "tests", "app", "chat")
    if module.startswith(("stages.common", "stages.conversations")):
        above = ("stages.conversations",) if module.startswith("stages.common") else ()
        return (*stages, *above, "commands", "bench", "tests", "chatapp", "app", "chat")
    if module.startswith("stages"):
        return (*stages, "commands", "bench", "tests", "chatapp", "app", "chat")
    if module.startswith("commands"):
        return ("bench", "tests", "chatapp", "app", "chat")
    if MODULES[module].is_relative_to(ROOT / "space"):
        return ("stages", "commands", "bench", "tests")
    if module.startswith("tests.") and not module.startswith("tests.support"):
        return tuple(name for name in MODULES if re.search(r"(^|\.)test_\w+$", name) and name != module)
    return ()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    """commands -> stages -> stages/conversations -> stages/common; space alone; no test module imports another."""
    for module, path in MODULES.items():
        if path.is_relative_to(ROOT / package):
            for name in imported_names(path):
                wrong = [other for other in forbidden(module) if name == other or name.startswith(f"{other}.")]
                assert not wrong, f"{path.relative_to(ROOT)} imports {name}"
            if package == "tests":
                bare = {name for name in imported_names(path) if name.partition(".")[0].startswith("test_")}
                assert not bare, f"{path.relative_to(ROOT)} imports {bare}"


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_code_that_shapes_a_stages_outputs_is_in_dvc_yaml(stage):
    code = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("stages/", "space/"))}
    named = set()
    for dep in code:
        found = files(dep) if (ROOT / dep).is_dir() else [ROOT / dep]
        assert all(path.exists() for path in found) and (ROOT / dep).exists(), dep
        named |= {name_of(path) for path in found if path.suffix == ".py"}
        # Without code: templates, of which each stage that reads them names the folder.
        assert found or list((ROOT / dep).glob("*.*")), dep
    imported = closure(f"stages.{stage}", SHAPES_NO_OUTPUT.keys())
    assert named - {"stages.conversations"} == imported - {"stages.conversations"}


def test_the_modules_that_shape_no_output_are_there_and_used():
    used = set().union(*(closure(f"stages.{stage}") for stage in PIPELINE), closure("stages.__main__"))
    assert SHAPES_NO_OUTPUT.keys() <= used


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PACKAGES)
def test_files_functions_and_signatures_are_short(folder):
    too_long = []
    for path in files(folder):
        where = path.relative_to(ROOT)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{where}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{where}:{node.lineno} {node.name}: {length} lines")
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given += [more for more in (node.args.vararg, node.args.kwarg) if more]
                count = len([argument for argument in given if argument.arg not in ("self", "cls")])
                if count > MAX_PARAMETERS:
                    too_long.append(f"{where}:{node.lineno} {node.name}: {count} parameters")
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("folder", PACKAGES)
def test_imports_stand_at_the_top_of_files(folder):
    for path in files(folder):
        where = path.relative_to(ROOT).as_posix()
        for function in ast.walk(tree(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                if (where, function.name) not in MAY_IMPORT:
                    assert not inside, f"{where}:{inside[0].lineno}: an import inside {function.name}"


# Packages ---------------------------------------------------------------------------------------------------------


def requirements() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


def imported_packages() -> dict[str, Path]:
    """The top-level name of every third-party import, with a file that has it."""
    own = {name.partition(".")[0] for name in MODULES}
    return {
        name: path
        for path in files(*PACKAGES)
        for name in {dotted.partition(".")[0] for dotted in imported_names(path)}
        if name and name not in own | set(sys.stdlib_module_names)
    }


def test_every_import_is_in_requirements():
    listed, distributions = requirements(), packages_distributions()
    missing = {}
    for name, path in imported_packages().items():
        candidates = {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
        if not candidates & listed:
            missing[" or ".join(sorted(candidates))] = str(path.relative_to(ROOT))
    assert not missing, f"add to requirements.txt: {missing}"


def test_every_requirement_is_imported_or_has_a_reason():
    distributions = packages_distributions()
    imported = {canonicalize_name(d) for name in imported_packages() for d in distributions.get(name, [name])}
    assert requirements() - imported <= NOT_IMPORTED.keys()
    assert not NOT_IMPORTED.keys() & imported


def test_every_requirement_is_locked():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = {canonicalize_name(line.partition("==")[0]) for line in lock.splitlines() if "==" in line}
    assert requirements() <= locked

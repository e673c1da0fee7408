"""The fixtures that tests share. No test needs a network or a downloaded model."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.common.entry import set_environment

# As the stages set it, before any library reads it; no test may reach a hub.
set_environment(network=False)
# Tiny models gain nothing from a second thread, and lose much when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.support.models import save_gpt2, save_llama, save_phi  # noqa: E402
from tests.support.project import Project, make_tiny, timed_repro  # noqa: E402
from tests.support.warm import WarmPython  # noqa: E402

# Tests that share one of these expensive fixtures run in one worker of pytest-xdist: each is made once.
GROUPS = {
    "pipeline": {"finished", "warm_python"},
    "hub": {"hub"},
    "states": {"made"},
    "chat": {"tiny_models", "exported_llama", "exported_phi"},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for group, fixtures in GROUPS.items():
            if fixtures & set(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.xdist_group(group))
                break


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups work by names that pytest-xdist gives. A pytest that it does not know keeps no group together."""
    for item in session.items if getattr(session.config.option, "loadgroup", False) else ():
        group = item.get_closest_marker("xdist_group")
        assert group is None or item.nodeid.endswith(f"@{group.args[0]}"), f"{item.nodeid} is in no group"


def pytest_terminal_summary(terminalreporter) -> None:
    """Say last, and once each, why tests were skipped: the reason names what to install."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        terminalreporter.section("not tested here")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, tiny_phi) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "model", tiny_phi)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory) -> Path:
    return save_phi(tmp_path_factory.mktemp("phi") / "model")


@pytest.fixture
def project(tmp_path) -> Project:
    return Project.new(tmp_path / "a project")  # a space in the path, as some have


@pytest.fixture
def tiny_project(project, tiny_llama) -> Project:
    return make_tiny(project, tiny_llama)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory) -> Iterator[Path]:
    """A `python` that runs stages without their imports: see tests/support/warm.py."""
    folder = tmp_path_factory.mktemp("warm")
    warm = WarmPython(folder, Project(folder).environment())
    yield warm.python
    warm.stop()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_llama, warm_python) -> Project:
    """A tiny project after one run, committed. No test may change it."""
    project = make_tiny(Project.new(tmp_path_factory.mktemp("finished") / "a project"), tiny_llama)
    project.python = warm_python
    _, project.seconds = timed_repro(project)
    project.commit("reproduced")
    return project


@pytest.fixture
def finished_project(finished, tmp_path) -> Project:
    """A copy of the finished project, for a test that changes it."""
    return finished.copy(tmp_path / "a project")


@pytest.fixture
def cold_project(finished_project) -> Project:
    """The same, for a test of the processes themselves: each is a real start."""
    finished_project.python = Path(sys.executable)
    return finished_project

"""The fixtures that tests share. No test needs a network or a downloaded model."""

import os
from pathlib import Path

import pytest

from stages.common.entry import set_environment

# As the stages set it, before any library reads it; no test may reach a hub.
set_environment(network=False)
# Tiny models gain nothing from a second thread, and lose much when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.support.models import save_gpt2, save_llama, save_phi  # noqa: E402
from tests.support.project import Project, make_tiny  # noqa: E402
from tests.support.serving import export_tiny  # noqa: E402


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
    return Project(tmp_path / "a project")  # a space in the path, as some have


@pytest.fixture
def tiny_project(project, tiny_llama) -> Project:
    return make_tiny(project, tiny_llama)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with two exported tiny models, tuned and base, as the chat app takes it."""
    return export_tiny(tmp_path_factory.mktemp("exported"))

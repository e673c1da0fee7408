"""Expensive things that the chat app's tests share: exported models, engines, a running app."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import sync_playwright

from bench.chat_server import chat_server
from chatapp.engine import MAX_ROWS, Engine
from chatapp.server.fair_queue import FairQueue
from tests.support.chat_page import executable
from tests.support.exported_models import exported, tuned_and_base
from tests.support.serving import served


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with two exported tiny models, tuned and base, as the chat app takes it."""
    return tuned_and_base(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def exported_llama(tiny_llama, tmp_path_factory):
    return exported(tiny_llama, "chatml", tmp_path_factory.mktemp("llama-cpu"))


@pytest.fixture(scope="session")
def exported_phi(tiny_phi, tmp_path_factory):
    return exported(tiny_phi, "phi2", tmp_path_factory.mktemp("phi-cpu"))


@pytest.fixture(scope="module", params=["llama", "phi"])
def model(request) -> SimpleNamespace:
    """Each exported tiny model: its folder and its tokenizer."""
    return request.getfixturevalue(f"exported_{request.param}")


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model.folder, threads=1)


@pytest.fixture(scope="session")
def engines(tiny_models) -> dict[str, Engine]:
    return {name: Engine(tiny_models / name, threads=1) for name in ("tuned", "base")}


@pytest.fixture(scope="session")
def address(engines) -> Iterator[str]:
    """The app in this process; gives its address."""
    with served(engines, FairQueue(at_once=MAX_ROWS)) as address:
        yield address


@pytest.fixture(scope="session")
def running(tiny_models):
    """The app in its own process; gives its address and the process. No test may end it."""
    with chat_server(tiny_models) as (address, process):
        yield address, process


@pytest.fixture(scope="module")
def browser():
    """One browser for the module. Playwright keeps an event loop in this thread, so other modules must not share it."""
    path = executable()
    with sync_playwright() as playwright:
        # The browser can reach nothing but loopback, whatever a page asks for.
        blocked = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=path, args=blocked)
        yield browser
        browser.close()

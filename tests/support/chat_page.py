"""The chat page in a real browser, as a reader sees it."""

import os
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from bench.chat_server import wait_until
from bench.screenshots import chromium

WAIT = 120_000  # milliseconds, enough for a busy machine


def executable() -> str:
    """The path of Chromium. Without it the test is skipped, or, where CI is set, fails."""
    path = chromium()
    if path is None:
        reason = "no Chromium on PATH; install the Debian package chromium: apt-get install chromium"
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    return path


class ChatPage:
    """The page and its parts. `outside` collects what the page loads from elsewhere, `faults` its errors."""

    def __init__(self, page: Page, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self.outside: list[str] = []
        self.faults: list[str] = []
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: self._note(request.url))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.box = page.get_by_role("textbox", name=re.compile("^Message(?! to all)"))
        self.questions = page.locator('#chat [data-testid="user"]')
        self.answers = page.locator('#chat .bot.message .message:not(.thought) [data-testid="bot"]')
        self.notes = page.locator("#chat .bot.message .thought")
        self.send = page.locator("#chat-box").get_by_role("button", name="Send")
        self.stop = page.locator("#chat-box").get_by_role("button", name="Stop")

    def _note(self, url: str) -> None:
        if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url):
            self.outside.append(url)

    def open(self, address: str) -> "ChatPage":
        self.page.goto(address)
        self.box.wait_for()
        return self

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_for_note(self, text: str) -> None:
        """Wait until the line below the first answer holds `text`."""
        wait_until(lambda: self.notes.count() and text in self.notes.first.text_content())

    def set_max_tokens(self, count: int) -> None:
        self.page.get_by_role("button", name="Settings").click()
        field, slider = (self.page.get_by_role(role, name="Max tokens") for role in ("spinbutton", "slider"))

        def taken() -> bool:
            """While the page is still being set up, it forgets what is typed. Only a test is so fast."""
            field.fill(str(count))
            field.press("Tab")
            time.sleep(0.2)
            # The slider stands at the nearest step.
            return field.input_value() == str(count) and abs(int(slider.input_value()) - count) < 8

        wait_until(taken)
        self.page.get_by_role("button", name="Settings").click()

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.folder / f"{name}.png")


def opened(browser: Browser, address: str, folder: Path, **options) -> ChatPage:
    """The page in a new browser context with these options."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    return ChatPage(context.new_page(), folder).open(address)

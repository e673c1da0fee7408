"""Take the screenshots of README.md and docs/data.md: docs/compare.png and docs/phone.png with the exported models,
docs/tokens.png of reports/tokens.html.

Needs Chromium on PATH. Run: `python -m bench.screenshots`. With `tokens` as argument it takes
the last one alone.
"""

import shutil
import sys
from typing import Any

from playwright.sync_api import sync_playwright

from bench.chat_server import ROOT, chat_server

MODELS = ROOT / "models/onnx"
TOKENS = ROOT / "reports/tokens.html"
DOCS = ROOT / "docs"
DESKTOP: dict[str, Any] = {"viewport": {"width": 1180, "height": 760}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 760},
    "color_scheme": "dark",
    "is_mobile": True,
    "has_touch": True,
}
TIMEOUT_ANSWER = 300_000  # milliseconds
COMPARED = "My laptop is slow. What should I do first?"
CHATTED = "How do I boil an egg so that the yolk stays soft?"


def chromium() -> str | None:
    """The path of the system's Chromium, if there is one. Nothing downloads Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def settle(page: Any, tokens: int) -> None:
    """Choose greedy answers of a length that fits the picture: every run gives the same."""
    page.get_by_role("button", name="Settings").click()
    for label, value in (("Temperature", 0), ("Max tokens", tokens)):
        field = page.get_by_role("spinbutton", name=label)
        field.fill(str(value))
        field.press("Tab")
    page.get_by_role("button", name="Settings").click()


def ask(page: Any, box: str, prompt: str) -> None:
    """Ask, and wait until the answer is complete."""
    page.locator(f"#{box} textarea").fill(prompt)
    page.locator(f"#{box} textarea").press("Enter")
    page.locator(f"#{box}").get_by_role("button", name="Stop").wait_for()
    page.locator(f"#{box}").get_by_role("button", name="Send").wait_for(timeout=TIMEOUT_ANSWER)
    page.wait_for_timeout(500)  # until the page has scrolled


def take_tokens(browser: Any) -> None:
    """The page of tokens: its legend, and the conversation with the most turns."""
    page = browser.new_context(viewport={"width": 1180, "height": 1000}, device_scale_factor=1).new_page()
    page.goto(TOKENS.as_uri())
    page.evaluate("document.querySelectorAll('section').forEach(s => { s.hidden = !/most turns/.test(s.innerText) })")
    page.screenshot(path=DOCS / "tokens.png")


def take_chat(browser: Any) -> None:
    """The chat app, on a desktop and on a phone."""
    with chat_server(MODELS) as (address, _):
        page = browser.new_context(**DESKTOP).new_page()
        page.goto(address)
        settle(page, 80)
        page.get_by_role("tab", name="Compare").click()
        ask(page, "compare-box", COMPARED)
        page.screenshot(path=DOCS / "compare.png")
        page = browser.new_context(**PHONE).new_page()
        page.goto(address)
        settle(page, 56)
        ask(page, "chat-box", CHATTED)
        page.screenshot(path=DOCS / "phone.png")


def main() -> None:
    if (executable := chromium()) is None:
        sys.exit("error: no chromium on PATH. Install it (Debian: apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        take_tokens(browser)
        if sys.argv[1:] != ["tokens"]:
            take_chat(browser)
        browser.close()
    print("The pictures in docs/ are new. Look at them.")


if __name__ == "__main__":
    main()

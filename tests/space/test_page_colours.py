"""The contrast of everything that the page shows, in a real browser: light and dark, at rest, hovered and disabled."""

import pytest

from chatapp.server.fair_queue import FairQueue
from tests.support.chat_page import ChatPage, opened
from tests.support.contrast import STILL, contrasts, poor
from tests.support.scripted import EVALUATION, MARKDOWN, scripted
from tests.support.serving import Held, served

pytestmark = pytest.mark.slow
BUTTONS = "button:visible, a:visible, summary:visible, [role=tab]:visible"


@pytest.fixture(scope="module")
def held():
    return {name: Held(engine) for name, engine in scripted(MARKDOWN, MARKDOWN).items()}


@pytest.fixture(scope="module")
def address(held):
    with served(held, FairQueue(), evaluation=EVALUATION) as address:
        yield address


@pytest.fixture(params=["light", "dark"])
def chat(request, browser, address, held, tmp_path):
    for engine in held.values():
        engine.hold()
    chat = opened(browser, address, tmp_path, color_scheme=request.param)
    chat.page.add_style_tag(content=STILL)  # no colour is on its way to another one
    yield chat
    chat.page.context.close()


def check(chat: ChatPage, state: str) -> None:
    """Every text is readable, also each button under the mouse."""
    chat.shot(state)
    assert poor(chat.page) == {}, state
    for button in chat.page.locator(BUTTONS).all():
        button.hover(force=True)
        assert poor(button) == {}, f"{state}, hovered"
    chat.page.mouse.move(0, 0)


def test_every_text_is_readable_while_people_chat(chat, held):
    check(chat, "start")
    chat.box.fill("A question of mine")
    check(chat, "typed")
    held["tuned"].allow(4)
    chat.box.press("Enter")
    chat.wait_for_note("4 tokens")
    check(chat, "growing")
    held["tuned"].allow()
    chat.send.wait_for()
    chat.page.locator("#chat .token").first.wait_for()
    check(chat, "answered")
    assert {"range", "A heading", "A question of mine"} <= {words.partition(" (")[0] for words in contrasts(chat.page)}
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_role("slider", name="Temperature").wait_for()
    check(chat, "settings")
    for button in chat.page.locator("#chat-box button, #chat button").all():
        button.evaluate("button => { button.disabled = true; }")
    chat.shot("disabled")
    assert chat.send.is_disabled() and poor(chat.page) == {}


def test_every_text_of_the_other_tabs_is_readable(chat, held):
    page = chat.page
    page.get_by_role("tab", name="Compare").click()
    check(chat, "compare, empty")
    page.get_by_role("textbox", name="Message to all models").fill("A question of mine")
    held["tuned"].allow(4)
    page.get_by_role("textbox", name="Message to all models").press("Enter")
    page.locator("#compare-box").get_by_role("button", name="Stop").wait_for()
    check(chat, "compare, growing")
    for engine in held.values():
        engine.allow()
    page.locator("#compare-base .token").first.wait_for()
    page.locator("#compare-box").get_by_role("button", name="Send").wait_for()
    check(chat, "compare")
    for button in page.locator("#compare-box button").all():
        button.evaluate("button => { button.disabled = true; }")
    check(chat, "compare, disabled")
    for name in ("About", "API"):
        page.get_by_role("tab", name=name).click()
        page.locator(f"#{name.lower()} td").first.wait_for()
        for summary in page.locator("summary:visible").all():
            summary.click()
        check(chat, name)


def test_the_measure_itself_finds_what_is_pale(chat):
    """Black on white is 21 to 1. Grey on white, a faded text and a pale placeholder are too low."""
    chat.page.set_content(
        "<style>::placeholder { color: #bbb; opacity: 1 }</style>"
        "<body style='background: white; color: black'><p>black</p><p style='color: #777'>grey</p>"
        "<p style='opacity: 0.5'>faded</p><input placeholder='typed'><p style='color: #767676'>just</p>"
        "<div style='background: #000'><p style='color: rgb(255 255 255 / 60%)'>clear</p></div>"
        "<p style='display: none; color: #eee'>no</p>"
    )
    found = {words.partition(" (")[0]: contrast for words, contrast in contrasts(chat.page).items()}
    assert found["black"] == 21 and found["just"] == pytest.approx(4.54, abs=0.01)
    assert found["clear"] == pytest.approx(7.4, abs=0.5) and "no" not in found
    assert {words.partition(" (")[0] for words in poor(chat.page)} == {"grey", "faded", "typed"}

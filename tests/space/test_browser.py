"""The chat page in a real browser: headless Chromium, with tiny models that take their time.

Each test leaves screenshots in its temporary folder (`pytest --basetemp=…` chooses where).
"""

import re
import time

import httpx
import pytest

from bench.chat_server import idle, wait_until
from chatapp.server.fair_queue import FairQueue
from tests.support.chat_page import opened
from tests.support.serving import COMMIT, Held, Paced, served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(engines):
    """The app with engines that take 10 ms for each piece."""
    slow = {name: Paced(engine, 0.01) for name, engine in engines.items()}
    with served(slow, FairQueue()) as address:
        yield address


@pytest.fixture
def chat(browser, address, tmp_path, request):
    chat = opened(browser, address, tmp_path, **getattr(request, "param", {}))
    yield chat
    chat.shot("end")
    chat.page.context.close()
    assert chat.outside == [] and chat.faults == []


@pytest.fixture(scope="module")
def held(engines):
    """Engines that wait for a test's permission before each piece."""
    return {name: Held(engine) for name, engine in engines.items()}


@pytest.fixture(scope="module")
def held_address(held):
    """The app with these engines."""
    with served(held, FairQueue()) as address:
        yield address


@pytest.fixture
def held_chat(browser, held, held_address, tmp_path):
    """The page of that app. No answer of it grows or ends but by permission, however slow the machine is."""
    for engine in held.values():
        engine.hold()
    chat = opened(browser, held_address, tmp_path)
    yield chat
    chat.shot("end")
    chat.page.context.close()  # which cancels what still waits
    assert chat.outside == [] and chat.faults == []
    wait_until(lambda: idle(held_address))


def test_an_answer_streams_with_its_speed(held_chat, held):
    chat, lengths = held_chat, [0]
    chat.set_max_tokens(128)
    chat.box.fill("What is the capital of France?")
    chat.send.click()

    def grew() -> bool:
        return chat.answers.count() and len(chat.answers.first.text_content()) > lengths[-1]

    for _ in range(6):
        held["tuned"].allow(8)
        wait_until(grew)
        lengths.append(len(chat.answers.first.text_content()))
        assert chat.stop.is_visible()
    held["tuned"].allow()
    chat.wait_for_note("128 tokens")
    chat.send.wait_for()
    assert chat.questions.all_text_contents()[0].strip() == "What is the capital of France?"
    assert re.search(r"128 tokens · \d+\.\d tokens/s.* · cut at max tokens", chat.notes.first.text_content())
    assert chat.box.input_value() == ""
    # The next turn continues the conversation.
    chat.ask("And of Spain?")
    wait_until(lambda: chat.answers.count() == 2)
    chat.send.wait_for()
    assert chat.questions.count() == chat.answers.count() == 2


def test_stop_keeps_the_text_and_frees_the_model(held_chat, held, held_address):
    chat = held_chat
    chat.set_max_tokens(1000)
    held["tuned"].allow(60)
    chat.ask("Tell me a long story")
    wait_until(lambda: chat.answers.count() and len(chat.answers.first.text_content()) > 20)
    assert not idle(held_address)
    chat.stop.click()
    chat.send.wait_for()
    wait_until(lambda: idle(held_address))
    chat.wait_for_note("stopped")
    said = chat.answers.first.text_content()
    time.sleep(0.5)
    assert len(said) > 20 and chat.answers.first.text_content() == said


def test_retry_gives_another_answer_and_undo_gives_the_question_back(chat):
    chat.set_max_tokens(16)
    chat.ask("first")
    chat.wait_for_note("16 tokens")
    chat.send.wait_for()
    before = chat.answers.first.text_content()
    chat.page.get_by_role("button", name="Retry").click()
    wait_until(lambda: chat.answers.first.text_content() not in ("", before))
    chat.send.wait_for()
    assert chat.questions.count() == chat.answers.count() == 1
    chat.page.get_by_role("button", name="Undo").click()
    wait_until(lambda: chat.box.input_value() == "first")
    assert chat.questions.count() == chat.answers.count() == 0


def test_an_example_is_asked_with_a_click(chat):
    chat.set_max_tokens(8)
    chat.page.get_by_role("button", name="Select example 2").click()
    chat.wait_for_note("8 tokens")
    assert "sky is blue" in chat.questions.first.text_content()


def test_base_and_tuned_answer_side_by_side(held_chat, held, held_address):
    chat = held_chat
    chat.set_max_tokens(40)
    for engine in held.values():
        engine.allow(20)
    chat.page.get_by_role("tab", name="Compare").click()
    box = chat.page.get_by_role("textbox", name="Message to all models")
    box.fill("What is the capital of France?")
    box.press("Enter")
    said = [chat.page.locator(f'#compare-{name} .bot.message [data-testid="bot"]') for name in ("base", "tuned")]

    def both_grow() -> bool:
        return all(answer.count() == 2 and 5 < len(answer.first.text_content()) for answer in said)

    wait_until(both_grow)
    assert chat.page.locator("#compare-box").get_by_role("button", name="Stop").is_visible()
    chat.shot("both")
    for engine in held.values():
        engine.allow()
    chat.page.locator("#compare-box").get_by_role("button", name="Send").wait_for()
    base, tuned = (answer.first.text_content() for answer in said)
    assert base != tuned
    assert all("40 tokens" in answer.last.text_content() for answer in said)
    # Stop ends both.
    chat.set_max_tokens(1000)
    for engine in held.values():
        engine.hold()
        engine.allow(20)
    box.fill("Once more")
    box.press("Enter")
    wait_until(lambda: all(answer.count() == 4 and len(answer.nth(2).text_content()) > 5 for answer in said))
    assert not idle(held_address)
    chat.page.locator("#compare-box").get_by_role("button", name="Stop").click()
    wait_until(lambda: idle(held_address))
    wait_until(lambda: all("stopped" in answer.last.text_content() for answer in said))


def test_the_card_is_on_the_page(chat):
    chat.page.get_by_role("tab", name="About").click()
    about = chat.page.locator("#about")
    about.wait_for()
    # Parameters, what was measured, the data's version and the project's commit.
    for fact in ("lora_r", "perplexity", "ada/trees", "9" * 40, COMMIT):
        assert fact in about.text_content(), fact


def test_everything_works_by_keyboard(held_chat, held):
    chat, page = held_chat, held_chat.page
    held["tuned"].allow(20)
    page.reload()
    wait_until(lambda: page.evaluate("document.activeElement.tagName") == "TEXTAREA")  # one can type at once
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    chat.stop.wait_for()
    page.keyboard.type("my next")  # typing stays possible, and Enter asks nothing meanwhile
    page.keyboard.press("Enter")
    assert chat.box.input_value().startswith("my next")
    for _ in range(3):
        if page.evaluate("document.activeElement.textContent").strip() == "Stop":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    chat.wait_for_note("stopped")
    assert chat.questions.count() == 1 and "two\nlines" in chat.questions.first.inner_text()
    page.keyboard.press("Shift+Tab")

    def press_until(role_or_text: str) -> None:
        for _ in range(30):
            page.keyboard.press("Shift+Tab")
            if role_or_text in page.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent).trim()"
            ):
                return
        raise AssertionError(f"{role_or_text} cannot be reached")

    press_until("Undo")
    page.keyboard.press("Enter")
    wait_until(lambda: chat.questions.count() == 0)
    press_until("Compare")
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Message to all models").wait_for()


@pytest.mark.parametrize("chat", [{"color_scheme": "dark"}], indirect=True)
def test_dark_mode_follows_the_system(chat):
    def brightness(selector: str, what: str) -> float:
        colour = chat.page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    chat.set_max_tokens(16)
    chat.ask("hello")
    chat.wait_for_note("16 tokens")
    assert brightness("body", "backgroundColor") < 60
    for text in ('#chat [data-testid="user"]', '#chat [data-testid="bot"]', "#chat-box textarea"):
        assert brightness(text, "color") > 150, text


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("chat", [PHONE], indirect=True)
def test_a_phone_shows_everything_without_sideways_scrolling(chat):
    chat.set_max_tokens(16)
    page = chat.page

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth") <= 390

    assert fits()
    box = chat.box.bounding_box()
    assert box["y"] + box["height"] <= 844  # one sees where to type
    chat.box.fill("hello " * 20)
    chat.send.tap()
    chat.wait_for_note("16 tokens")
    assert fits()
    chat.shot("chat")
    page.get_by_role("tab", name="Compare").tap()
    page.locator("#compare-tuned").wait_for()
    base, tuned = (page.locator(f"#compare-{name}").bounding_box() for name in ("base", "tuned"))
    assert fits() and tuned["y"] >= base["y"] + base["height"]  # one below the other
    page.get_by_role("tab", name="About").tap()
    page.locator("#about").wait_for()
    assert fits()


def test_a_closed_page_frees_the_model(browser, held, held_address, tmp_path):
    held["tuned"].hold()
    held["tuned"].allow(20)
    chat = opened(browser, held_address, tmp_path)
    chat.set_max_tokens(1000)
    chat.ask("Tell me a long story")
    wait_until(lambda: chat.answers.count() and chat.answers.first.text_content())
    assert not idle(held_address)
    chat.page.context.close()
    pieces = 0

    def freed() -> bool:
        """The server notices at a next piece that nobody reads."""
        nonlocal pieces
        held["tuned"].allow(1)
        pieces += 1
        return idle(held_address)

    wait_until(freed)
    assert pieces < 200  # the answer would have more


def test_a_page_and_the_api_share_the_queue(held_chat, held, held_address):
    chat = held_chat
    chat.set_max_tokens(100)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 150, "stream": True}
    held["tuned"].allow(1)  # the status comes with the first piece
    with httpx.stream("POST", f"{held_address}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        chat.ask("hello")
        chat.wait_for_note("waiting: 1 answer")
    held["tuned"].allow()
    chat.wait_for_note("tokens/s")

"""What the page keeps in view, keeps over a reload and offers in Compare, in a real browser with scripted answers."""

import re

import pytest

from bench.chat_server import idle, wait_until
from chatapp.server.fair_queue import FairQueue
from tests.support.chat_page import ChatPage, opened
from tests.support.scripted import EVALUATION, LONG, scripted
from tests.support.serving import Held, served

pytestmark = pytest.mark.slow
PHONE = {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True}
SMALL = {"viewport": {"width": 360, "height": 600}, "has_touch": True, "is_mobile": True}
NAMES = ("base", "tuned")


@pytest.fixture(scope="module")
def held():
    return {name: Held(engine) for name, engine in scripted(LONG, LONG.upper()).items()}


@pytest.fixture(scope="module")
def address(held):
    with served(held, FairQueue(), evaluation=EVALUATION) as address:
        yield address


@pytest.fixture
def chat(request, browser, address, held, tmp_path):
    for engine in held.values():
        engine.hold()
        engine.allow()
    chat = opened(browser, address, tmp_path, **getattr(request, "param", {}))
    yield chat
    chat.shot("end")
    chat.page.context.close()
    assert chat.outside == [] and chat.faults == []
    wait_until(lambda: idle(address))


def questions(chat: ChatPage) -> list[str]:
    return [text.strip() for text in chat.questions.all_text_contents()]


class Compare:
    """The parts of the Compare tab, which this opens."""

    def __init__(self, chat: ChatPage) -> None:
        self.page = chat.page
        self.page.get_by_role("tab", name="Compare").click()
        self.box = self.page.get_by_role("textbox", name="Message to all models")
        self.box.wait_for()
        self.send = self.page.locator("#compare-box").get_by_role("button", name="Send")

    def ask(self, text: str) -> None:
        """Ask, and wait for the answers: they may be complete before one sees them grow."""
        count = len(self.notes("base"))
        self.box.fill(text)
        self.box.press("Enter")

        def answered() -> bool:
            notes = [self.notes(name) for name in NAMES]
            return all(len(lines) == count + 1 and "tokens/s" in lines[-1] and "…" not in lines[-1] for lines in notes)

        wait_until(answered)
        self.send.wait_for()

    def questions(self, name: str) -> list[str]:
        texts = self.page.locator(f'#compare-{name} [data-testid="user"]').all_text_contents()
        return [text.strip() for text in texts]

    def notes(self, name: str) -> list[str]:
        return self.page.locator(f"#compare-{name} .thought").all_text_contents()

    def press(self, name: str, label: str) -> None:
        self.page.locator(f"#compare-{name}").get_by_role("button", name=label).last.click()


def in_view(locator) -> bool:
    """Whether all of the element is inside the window, and nothing covers its middle."""
    return locator.evaluate(
        """element => {
          const { left, right, top, bottom } = element.getBoundingClientRect();
          const there = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
          const inside = top >= 0 && left >= 0 && bottom <= innerHeight && right <= innerWidth;
          return inside && (element.contains(there) || there.contains(element));
        }"""
    )


@pytest.mark.parametrize("chat", [{}, PHONE, SMALL], ids=["desktop", "phone", "small phone"], indirect=True)
def test_compare_keeps_the_question_and_the_prompt_box_in_view(chat):
    chat.set_max_tokens(200)
    compare = Compare(chat)
    assert in_view(compare.box)
    for question in ("My laptop is slow. What should I do first?", "And then? " * 40):
        compare.ask(question)
        chat.page.wait_for_timeout(500)  # until the answers have scrolled
        chat.shot(question[:3])
        assert in_view(compare.box) and in_view(compare.send)
        for name in NAMES:
            box = chat.page.locator(f"#compare-{name}")
            shown = box.locator(".user-row").last.bounding_box()
            whole = box.bounding_box()
            assert whole["y"] <= shown["y"] and shown["y"] + shown["height"] <= whole["y"] + whole["height"]
            assert shown["height"] < 0.6 * whole["height"]  # the answer has room
            # What one sees in the middle of the question is the question.
            assert in_view(box.locator(".user-row .message-content").last)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= chat.page.viewport_size["width"]


def test_compare_retries_and_undoes_in_both_conversations(chat, held):
    chat.set_max_tokens(8)
    compare = Compare(chat)
    for question in ("first", "second"):
        compare.ask(question)
    for engine in held.values():
        engine.hold()
        engine.allow(4)
    compare.press("tuned", "Retry")
    wait_until(lambda: all("4 tokens" in compare.notes(name)[-1] for name in NAMES))
    assert all("8 tokens" in compare.notes(name)[0] for name in NAMES)
    for engine in held.values():
        engine.allow()
    compare.send.wait_for()
    wait_until(lambda: all("8 tokens" in compare.notes(name)[-1] for name in NAMES))
    assert all(compare.questions(name) == ["first", "second"] for name in NAMES)
    compare.press("base", "Undo")
    wait_until(lambda: compare.box.input_value() == "second")
    assert all(compare.questions(name) == ["first"] for name in NAMES)


def test_a_reload_keeps_the_conversation(chat):
    chat.set_max_tokens(8)
    chat.ask("first")
    chat.wait_for_note("8 tokens")
    chat.send.wait_for()
    chat.page.reload()
    wait_until(lambda: questions(chat) == ["first"])
    assert "8 tokens" in chat.notes.first.text_content() and "stopped" not in chat.notes.first.text_content()
    # It goes on, and what is cleared or taken back stays so.
    chat.set_max_tokens(8)
    chat.ask("second")
    wait_until(lambda: chat.notes.count() == 2)
    chat.send.wait_for()
    chat.page.get_by_role("button", name="Undo").last.click()
    wait_until(lambda: chat.questions.count() == 1)
    chat.page.reload()
    wait_until(lambda: questions(chat) == ["first"])
    chat.page.get_by_role("button", name="Clear").first.click()
    wait_until(lambda: chat.questions.count() == 0)
    chat.page.reload()
    chat.page.get_by_role("button", name="Select example 2").wait_for()
    assert chat.questions.count() == 0


def test_a_reload_keeps_both_conversations_of_compare(chat):
    chat.set_max_tokens(8)
    compare = Compare(chat)
    compare.ask("both")
    notes = [compare.notes(name) for name in NAMES]
    chat.page.reload()
    compare = Compare(chat)
    wait_until(lambda: all(compare.questions(name) == ["both"] for name in NAMES), seconds=20)
    assert [compare.notes(name) for name in NAMES] == notes
    assert chat.questions.count() == 0
    compare.press("base", "Clear")
    wait_until(lambda: not any(compare.questions(name) for name in NAMES))
    chat.page.reload()
    compare = Compare(chat)
    chat.page.get_by_text("Answers of the base model").wait_for()
    assert not any(compare.questions(name) for name in NAMES)


def test_a_reload_keeps_what_an_answer_had_said(chat, held):
    held["tuned"].hold()
    held["tuned"].allow(5)
    chat.ask("first")
    chat.wait_for_note("5 tokens")
    chat.page.wait_for_timeout(300)  # until it is stored
    chat.page.reload()
    chat.wait_for_note("stopped")
    assert chat.answers.first.text_content().strip() == " ".join(LONG.split()[:5])
    assert re.fullmatch(r"5 tokens · .*tokens/s · stopped", chat.notes.first.text_content().strip())
    held["tuned"].allow()
    chat.page.get_by_role("button", name="Retry").click()
    chat.wait_for_note("cut at max tokens")


@pytest.mark.parametrize("chat", [{}, PHONE], ids=["desktop", "phone"], indirect=True)
def test_settings_open_in_view(chat):
    slider = chat.page.get_by_role("slider", name="Max tokens")
    chat.page.get_by_role("button", name="Settings").click()
    slider.wait_for()
    wait_until(lambda: in_view(slider), seconds=10)


@pytest.mark.parametrize("chat", [PHONE], indirect=True)
def test_about_folds_the_parameters(chat):
    chat.page.get_by_role("tab", name="About").click()
    about = chat.page.locator("#about")
    about.get_by_text("95 % interval [-0.362, -0.245]").wait_for()
    assert about.get_by_role("cell", name="16.68").is_visible() and not about.get_by_text("lora_r").is_visible()
    about.get_by_text("Training parameters").click()
    assert about.get_by_text("lora_r").is_visible()


@pytest.mark.parametrize("chat", [{}, PHONE], ids=["desktop", "phone"], indirect=True)
def test_the_api_is_one_click_away(chat, address):
    tab = chat.page.get_by_role("tab", name="API")
    assert in_view(tab)
    tab.click()
    usage = chat.page.locator("#api")
    usage.get_by_text(f"curl {address}/v1/chat/completions").wait_for()
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= chat.page.viewport_size["width"]
    link = usage.get_by_role("link", name="/v1/models").get_attribute("href")
    assert chat.page.request.get(link).json()["data"][0]["id"] == "tuned"

"""Languages of conversations that state none: found in real sentences, unknown where a text is too short."""

import pytest

from stages.conversations.languages import detect_languages, detected_note, language_of
from tests.support.conversations import check_funnel, frame, run
from tests.support.rows import message

SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_has_its_language(code):
    assert language_of(SENTENCES[code]) == code


@pytest.mark.parametrize("text", ["Hi", "", "12 + 30 = 42", "🙂🙂", "OK", "def f(x):\n    return x + 1"])
def test_a_short_text_has_none(text):
    assert language_of(text) == "unknown"


def trees() -> list[dict]:
    """A tree of each language, and a short one; none says which."""
    rows = []
    for code, text in {**SENTENCES, "short": "Hi"}.items():
        rows.append(message(code, role="prompter", text=text, lang=None))
        rows.append(message(f"{code}.a", code, text=text if code != "short" else "Yo", lang=None))
    return rows


def test_the_languages_filter_works_on_what_is_detected():
    rows = [*trees(), message("said", role="prompter", lang="sv", text="All human beings"), message("said.a", "said")]
    conversations, funnel = run(rows, detect_languages=True, languages=["de", "pt-BR"])
    assert set(conversations["message_tree_id"]) == {"de", "pt", "short"}
    assert dict(zip(conversations["message_tree_id"], conversations["lang"], strict=True)) == {
        "de": "de",
        "pt": "pt-BR",  # as `languages` has it
        "short": "unknown",
    }
    assert funnel["dropped"]["language"]["by_language"]["sv"]["messages"] == 1  # what states one keeps it
    found = funnel["detected_languages"]
    assert found["unknown"] == 1 and found["en"] == 1 and sum(found.values()) == len(SENTENCES) + 1
    check_funnel(funnel)


def test_off_by_default():
    conversations, funnel = run(trees(), languages=["de"])
    assert set(conversations["message_tree_id"]) == {*SENTENCES, "short"} and "detected_languages" not in funnel


def test_a_conversation_has_one_language_and_bad_rows_have_none():
    mixed = [
        message("a", role="prompter", text=f"Translate into German, please: {SENTENCES['en']}", lang=None),
        message("a.1", "a", text="Gern.", lang=None),
        message("b", role="prompter", text=None, lang=None),
    ]
    table, found = detect_languages(frame(mixed), [])
    assert list(table["lang"]) == ["en", "en", "unknown"] and found == {"en": 1}
    assert detected_note(found) == (
        "languages detected of 1 conversations that state none: en 1; 0 too short or unclear, which stay unknown and "
        "pass the languages filter"
    )

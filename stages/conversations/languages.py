"""The language of conversations that state none, detected from their text by py3langid (a naive Bayes model over bytes,
which comes with the package: nothing is downloaded, and the same text always gives the same language)."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import pandas as pd
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from stages.conversations.messages import UNKNOWN

MIN_CONFIDENCE = 0.7  # of the model, which is calibrated; a less clear text stays without a language
MAX_CHARACTERS = 500  # of a conversation that are read: enough for a clear answer
NO_LANGUAGE = ("und", "zxx")  # undetermined; no words


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_CONFIDENCE)


def language_of(text: str) -> str:
    """The language of a text (ISO 639: en, pt, zh), or UNKNOWN where it is too short or not clear."""
    code, _ = _identifier().classify(text[:MAX_CHARACTERS])
    return UNKNOWN if code in NO_LANGUAGE else str(code)


def detect_languages(messages: pd.DataFrame, languages: Sequence[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """`messages` with a language for each conversation or tree that states none, and how many were found of each.

    All such messages of a tree get one language, so that none loses an answer. It gets the name that `languages`, those
    to keep, has for it: pt-BR for Portuguese, if that is listed.
    """
    names = {name.partition("-")[0].lower(): name for name in languages}
    unstated = messages[(messages["lang"] == UNKNOWN) & messages["message_tree_id"].notna() & messages["text"].notna()]
    found = {}
    for tree, texts in unstated.groupby("message_tree_id", sort=False)["text"]:
        code = language_of("\n".join(texts.iloc[:MAX_CHARACTERS]))
        found[tree] = names.get(code, code)
    lang = messages["lang"].where(~messages.index.isin(unstated.index), messages["message_tree_id"].map(found))
    return messages.assign(lang=lang), dict(Counter(found.values()).most_common())


def detected_note(found: dict[str, int]) -> str:
    """What was detected, in one line."""
    clear = ", ".join(f"{name} {count}" for name, count in found.items() if name != UNKNOWN)
    unclear = found.get(UNKNOWN, 0)
    return (
        f"languages detected of {sum(found.values())} conversations that state none: {clear or 'none'}; "
        f"{unclear} too short or unclear, which stay unknown and pass the languages filter"
    )

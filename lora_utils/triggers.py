"""The words that name what is taught: found in captions and prompts as words, in any script.

The rule. A trigger word or class word is found where it stands as a word of its own, in any capitals: `TOK` is in
"a tok, at night" and in "TOK's hat", not in "TOKYO" and not in "TOKs", for a plural is another word. Scripts that
write words without spaces between them have no such borders. A placeholder token like `<zwx>` is found exactly as it
is written, wherever it stands, for so the model reads it. This module imports the standard library alone.
"""

import re
import unicodedata
from collections.abc import Sequence

from lora_utils.errors import UserError, shown

TRIGGER = "[trigger]"  # in captions and prompts: it stands for the trigger word or the placeholder token
_TRIGGER = re.compile(re.escape(TRIGGER), re.IGNORECASE)
# Scripts, by how Unicode's names of their characters begin, whose words aren't told apart by spaces, or take particles
# without one.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def _joins(character: str) -> bool:
    """Return whether a character goes on the word beside it: letters, digits, marks, underscores, of most scripts."""
    if not (character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")):
        return False
    return not unicodedata.name(character, "").startswith(_UNSPACED)


def _is_token(word: str) -> bool:
    return word.startswith("<") and word.endswith(">")


def _found(text: str, word: str) -> list[tuple[int, int]]:
    """Return where a word stands in a text, as (start, end)."""
    if not word:
        return []
    if _is_token(word):
        return [found.span() for found in re.finditer(re.escape(word), text)]
    forms = dict.fromkeys(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))
    places = []
    for found in re.finditer("|".join(map(re.escape, forms)), text, re.IGNORECASE):
        start, end = found.span()
        before, after = text[start - 1 : start], text[end : end + 1]
        inside = (before and _joins(before) and _joins(text[start])) or (
            after and (unicodedata.category(after).startswith("M") or (_joins(after) and _joins(text[end - 1])))
        )
        if not inside:
            places.append((start, end))
    return places


def holds(text: str, word: str) -> bool:
    """Return whether a text holds a trigger word, a class word or a token."""
    return bool(_found(text, word))


def replace_words(text: str, words: Sequence[str], by: str) -> str:
    """Return a text with each of these words replaced by another one, which isn't doubled where it follows already.

    'a photo of <zwx> person' becomes 'a photo of person', not 'a photo of person person'.
    """
    places = sorted(place for word in words for place in _found(text, word))
    following = _found(text, by)
    parts, read = [], 0
    for start, end in places:
        if start < read:  # within the one before
            continue
        doubled = next((last for first, last in following if first > end - 1 and text[end:first].isspace()), end)
        parts += [text[read:start], by]
        read = doubled
    return "".join([*parts, text[read:]])


def holds_mark(text: str) -> bool:
    """Return whether a text holds `[trigger]`, in any capitals."""
    return _TRIGGER.search(text) is not None


def expand_trigger(text: str, trigger_word: str, tokens: Sequence[str]) -> str:
    """Replace `[trigger]`, in any capitals, by the trigger word, or where there is none by the only token.

    Raises UserError where neither tells what it stands for.
    """
    if not holds_mark(text):
        return text
    stands_for = [trigger_word] if trigger_word else list(tokens)
    if len(stands_for) != 1:
        why = "there is neither trigger_word nor token" if not stands_for else f"it could be {', '.join(stands_for)}"
        raise UserError(
            f"the text {shown(text, 60)!r} holds {TRIGGER}, but {why}; set trigger_word, or write the word."
        )
    return _TRIGGER.sub(lambda _: stands_for[0], text)

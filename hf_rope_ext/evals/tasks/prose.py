"""Haystacks: RULER's noise, generated prose, or the user's own file."""

import random
import re
from functools import cache

from hf_rope_ext.evals.text import read_text

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""Filler of passkey prompts (Mohtashami and Jaggi, 2023) and of RULER."""

_WHO = [
    "Anna", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Henrik", "Irina", "Jonas",
    "Karin", "Lukas", "Marta",
]  # fmt: skip
_DID = [
    "walked past", "drew a plan of", "wrote a letter about", "looked for", "spoke about",
    "took a picture of", "waited beside", "slowly repaired", "sold a map of", "read a story about",
    "asked the way to", "remembered",
]  # fmt: skip
_WHAT = [
    "old mill", "stone bridge", "narrow street", "railway station", "green hill", "small harbour",
    "wooden tower", "market square", "empty theatre", "river bank", "quiet library", "white church",
    "long fence", "village school",
]  # fmt: skip
_WHEN = [
    "before sunrise", "on a cold morning", "after the rain", "late in the evening",
    "during the harvest", "in the first week of spring", "while the others slept", "without a word",
    "as the bells rang", "with an umbrella under one arm", "for the second time that year",
    "in no hurry at all",
]  # fmt: skip


def noise(count: int) -> str:
    """Return ``count`` sentences of repeated noise."""
    return " ".join(NOISE[index % len(NOISE)] for index in range(count))


def sentences(count: int, path: str = "") -> list[str]:
    """Return the first sentences of a text, repeating it as needed.

    Args:
        count: Number of sentences.
        path: UTF-8 text file; generated prose if empty.

    Raises:
        RopeError: If the file cannot be read or is empty.
    """
    if not path:
        return [_generated(index) for index in range(count)]
    text = _sentences_of(read_text(path))
    return [text[index % len(text)] for index in range(count)]


def words(count: int, path: str = "") -> list[str]:
    """Return the first words of a text, repeating it as needed; ``path`` as in `sentences`."""
    if not path:
        # every generated sentence has at least five words
        text = " ".join(sentences(count // 5 + 1)).split(" ")
    else:
        text = list(_words_of(read_text(path)))
        text = text * (count // len(text) + 1)
    return text[:count]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, split after full stops, question and exclamation marks."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


@cache
def _generated(index: int) -> str:
    draw = random.Random(f"prose {index}")
    who, did, what, when = (draw.choice(part) for part in (_WHO, _DID, _WHAT, _WHEN))
    return f"{who} {did} the {what} {when}."


@cache
def _sentences_of(text: str) -> tuple[str, ...]:
    return tuple(re.sub(r"\s+", " ", part) for part in split_sentences(text))


@cache
def _words_of(text: str) -> tuple[str, ...]:
    return tuple(text.split())

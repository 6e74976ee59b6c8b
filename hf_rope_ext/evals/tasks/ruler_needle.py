"""RULER's eight needle tasks (Hsieh et al., 2024, arXiv:2404.06654, app. B; NVIDIA/RULER)."""

import random
from dataclasses import dataclass
from typing import Literal

from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Place
from hf_rope_ext.evals.tasks.kv import draw_uuid
from hf_rope_ext.evals.tasks.lexicon import adjective_nouns
from hf_rope_ext.evals.tasks.prose import NOISE, split_sentences, words

NEEDLE = "One of the special magic {type} for {key} is: {value}."
PROMPT = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {type} afterwards.\n{context}\nWhat are all the special magic {type} "
    "for {query} mentioned in the provided text?"
)
PROMPT_OF_ONE = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {type} afterwards.\n{context}\nWhat is the special magic {type} "
    "for {query} mentioned in the provided text?"
)
ANSWER = " The special magic {type} for {query} mentioned in the provided text {verb}"
SHUFFLE_SEED = 42
ESSAY_DEPTHS = [round(100 * number / 39) for number in range(40)]
"""Possible needle depths, in percent of the essay's sentences."""

Words = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, kw_only=True)
class RulerNeedle(DocumentTask):
    """RULER: the values of keys hidden in noise, in an essay, or among other needles.

    Args:
        hay: Kind of haystack; the unit is a line, or a word for ``"essay"``.
        key: Kind of keys.
        value: Kind of values.
        keys: Number of keys hidden.
        values: Number of values per key.
        queries: Number of keys asked for.
        haystack: UTF-8 text file instead of RULER's essays, which cannot be redistributed;
            generated prose if empty. ``"essay"`` scores are comparable only on the same text.
    """

    max_new_tokens: int = 128
    hay: Literal["noise", "essay", "needle"] = "noise"
    key: Words = "words"
    value: Words = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    haystack: str = ""

    smallest = 4

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a prompt with ``size`` lines or words of haystack.

        Random numbers are drawn in the order of NVIDIA's generator (keys and values, haystack,
        positions, query), so that the same random state gives the same text.
        """
        keys: list[str] = []
        values: list[list[str]] = []
        needles: list[str] = []
        for _ in range(self.keys):
            keys.append(_draw(draw, self.key))
            values.append([])
            for _ in range(self.values):
                values[-1].append(_draw(draw, self.value))
                needles.append(NEEDLE.format(type=self.value, key=keys[-1], value=values[-1][-1]))
        random.Random(SHUFFLE_SEED).shuffle(needles)
        context = (
            self._essay(draw, size, needles)
            if self.hay == "essay"
            else self._lines(draw, size, needles)
        )
        asked = draw.sample(range(self.keys), self.queries)
        query = ", ".join(keys[index] for index in asked)
        if len(asked) > 1:
            query = ", ".join(keys[index] for index in asked[:-1]) + f", and {keys[asked[-1]]}"
        single = self.queries * self.values == 1
        kind = self.value.removesuffix("s") if single else self.value
        prompt = PROMPT_OF_ONE if single else PROMPT
        gold = tuple(value for index in asked for value in values[index])
        metadata = {"needles": needles, "query": query}
        if self.hay == "essay":
            metadata["essay_source"] = self.haystack or "generated"
        return Draft(
            prompt=prompt.format(type=kind, context=context, query=query),
            answer=ANSWER.format(type=kind, query=query, verb="is" if single else "are"),
            target=" " + ", ".join(gold) + ".",
            gold=gold,
            metadata=metadata,
        )

    def _lines(self, draw: random.Random, size: int, needles: list[str]) -> str:
        if self.hay == "noise":
            lines = [" ".join(NOISE)] * size
        else:
            lines = [
                NEEDLE.format(
                    type=self.value, key=_draw(draw, self.key), value=_draw(draw, self.value)
                )
                for _ in range(size)
            ]
        places = sorted(draw.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _essay(self, draw: random.Random, size: int, needles: list[str]) -> str:
        text = split_sentences(" ".join(words(size, self.haystack)))
        depths = sorted(draw.sample(ESSAY_DEPTHS, len(needles)))
        places = [0, *(int(len(text) * (depth / 100)) for depth in depths), len(text)]
        parts = []
        for number, place in enumerate(places[1:]):
            parts.append(" ".join(text[places[number] : place]))
            parts += needles[number : number + 1]
        return " ".join(parts)


def _draw(draw: random.Random, kind: Words) -> str:
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    return draw_uuid(draw) if kind == "uuids" else draw.choice(adjective_nouns())

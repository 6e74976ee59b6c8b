"""One or several needles in prose (after Kamradt's needle in a haystack, 2023)."""

import random
from dataclasses import dataclass

from hf_rope_ext.checks import require_integer
from hf_rope_ext.evals.tasks.base import DepthTask, Draft, Place
from hf_rope_ext.evals.tasks.prose import sentences

CITIES = [
    "Lisbon", "Kyoto", "Nairobi", "Oslo", "Quito", "Bergen", "Hanoi", "Tbilisi", "Porto", "Cusco",
    "Riga", "Dakar", "Perth", "Naples",
]  # fmt: skip
THINGS = [
    "eat grilled sardines", "ride the night tram", "hear the brass band", "climb the water tower",
    "buy a paper kite", "row across the lake", "visit the clock museum", "taste plum dumplings",
    "watch the pelicans", "feed the goats", "sketch the lighthouse", "rent a red bicycle",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Needle(DepthTask):
    """Out-of-place sentences among sentences of prose (unit: a sentence).

    The first needle is at the depth, the others are spread evenly between it and the end.

    Args:
        needles: Number of needles.
        haystack: UTF-8 text file to hide them in; generated prose if empty.
    """

    max_new_tokens: int = 48
    needles: int = 1
    haystack: str = ""

    def check(self) -> None:
        """Check the number of needles."""
        super().check()
        require_integer("needles", self.needles, 1, len(THINGS))

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return prose of ``size`` sentences that contains the needles."""
        cities = draw.sample(CITIES, self.needles)
        things = draw.sample(THINGS, self.needles)
        depth = place.depth or 0.0
        text = sentences(size, self.haystack)
        facts = [
            f"The best thing to do in {city} is to {thing}."
            for city, thing in zip(cities, things, strict=True)
        ]
        for number in reversed(range(self.needles)):
            at = depth + (1 - depth) * number / self.needles
            text.insert(round(at * size), facts[number])
        if self.needles == 1:
            question = f"What is the best thing to do in {cities[0]}?"
            answer = f" The best thing to do in {cities[0]} is to"
        else:
            several = ", ".join(cities[:-1]) + " and " + cities[-1]
            question = f"What are the best things to do in {several}?"
            answer = f" The best things to do in {several} are, in this order, to"
        return Draft(
            prompt=f"Read the text and answer the question.\n\n{' '.join(text)}\n\n{question}",
            answer=answer,
            target=" " + ", ".join(things) + ".",
            gold=tuple(things),
            metadata={"needles": facts, "haystack": self.haystack or "generated"},
        )

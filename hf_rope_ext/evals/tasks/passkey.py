"""Passkey retrieval (Mohtashami and Jaggi, 2023, arXiv:2305.16300; used by PI and YaRN)."""

import random
from dataclasses import dataclass
from typing import ClassVar

from hf_rope_ext.evals.tasks.base import DepthTask, Draft, Kind, Place
from hf_rope_ext.evals.tasks.prose import noise
from hf_rope_ext.evals.tasks.scorers import first_number

OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)


@dataclass(frozen=True, kw_only=True)
class Passkey(DepthTask):
    """A number from 1 to 50000 hidden in repeated noise (unit: a sentence of noise)."""

    max_new_tokens: int = 10

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return the prompt of the landmark paper with ``size`` sentences of noise."""
        key = draw.randint(1, 50000)
        before = round((place.depth or 0.0) * size)
        information = f"The pass key is {key}. Remember it. {key} is the pass key."
        parts = (OPENING, noise(before), information, noise(size - before))
        return Draft(
            prompt="\n".join((*parts, "What is the pass key?")),
            answer=" The pass key is",
            target=f" {key}",
            gold=(str(key),),
        )

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the first number is the key."""
        return {"score": float(first_number(prediction) == gold[0])}


@dataclass(frozen=True, kw_only=True)
class TeacherForcedPasskey(Passkey):
    """The prompts of `rope_passkey`, teacher-forced: the key must be the greedy continuation."""

    kind: ClassVar[Kind] = "loglikelihood"

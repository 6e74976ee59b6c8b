"""A chain of small sums spread over a text: answered directly, step by step, or by majority."""

import itertools
import random
from dataclasses import dataclass
from typing import Any, Literal

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.base import Draft, Place, Task
from hf_rope_ext.evals.tasks.prose import sentences
from hf_rope_ext.evals.tasks.scorers import final_answer, first_number, majority

NAMES = [
    "amber",
    "basil",
    "cedar",
    "denim",
    "ember",
    "flint",
    "grove",
    "hazel",
    "ivory",
    "jasper",
    "kelp",
    "lotus",
    "maple",
]


@dataclass(frozen=True, kw_only=True)
class Chain(Task):
    """Each number is the one before plus a small one; prose stands between the statements.

    Args:
        mode: ``"direct"``, ``"cot"`` (chain of thought, Wei et al., 2022, arXiv:2201.11903) or
            ``"maj"`` (self-consistency, Wang et al., 2022, arXiv:2203.11171).
        hops: Sums from the first number to the one asked for.
        n: Samples of each question under ``"maj"``.
        temperature: Of these samples.
        haystack: A UTF-8 text to spread the statements over; generated where it is empty.
    """

    max_new_tokens: int = 8
    mode: Literal["direct", "cot", "maj"] = "direct"
    hops: int = 3
    n: int = 8
    temperature: float = 0.7
    haystack: str = ""

    def check(self) -> None:
        """Check the options."""
        if not 1 <= self.hops < len(NAMES):
            raise RopeError(f"hops must be from 1 to {len(NAMES) - 1}, got {self.hops!r}.")
        if self.n < 1 or self.temperature <= 0:
            raise RopeError(
                f"n must be at least 1 and temperature above 0, got {self.n!r} and "
                f"{self.temperature!r}."
            )

    @property
    def sampling(self) -> dict[str, Any] | None:
        """How answers are sampled; None for greedy decoding."""
        return {"n": self.n, "temperature": self.temperature} if self.mode == "maj" else None

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return statements in order, spread over ``size`` sentences of prose."""
        names = draw.sample(NAMES, self.hops + 1)
        value = draw.randint(1, 9)
        statements = [f"The number of {names[0]} is {value}."]
        for before, name in itertools.pairwise(names):
            added = draw.randint(1, 9)
            value += added
            statements.append(f"The number of {name} is the number of {before} plus {added}.")
        text = sentences(size, self.haystack)
        places = sorted(draw.choices(range(size + 1), k=len(statements)))
        for shift, (at, statement) in enumerate(zip(places, statements, strict=True)):
            text.insert(at + shift, statement)
        question = f"Question: What is the number of {names[-1]}?"
        if self.mode == "direct":
            answer = "\nAnswer:"
        else:
            question += " Think step by step, then write 'Answer:' and the number."
            answer = "\nReasoning:"
        return Draft(
            prompt=f"{' '.join(text)}\n\n{question}",
            answer=answer,
            target=f" {value}",
            gold=(str(value),),
            metadata={"statements": statements},
        )

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the number is right: the first of a direct answer, else the final one."""
        return {"score": float(self._answer(prediction) == gold[0])}

    def score_samples(self, gold: tuple[str, ...], predictions: list[str]) -> dict[str, float]:
        """Return maj@n as the score, the share of the winner, and the share of right samples."""
        answers = [self._answer(one) for one in predictions]
        winner, confidence = majority(answers)
        return {
            "score": float(winner == gold[0]),
            "confidence": confidence,
            "pass@1": sum(answer == gold[0] for answer in answers) / len(answers),
        }

    def _answer(self, prediction: str) -> str | None:
        return (first_number if self.mode == "direct" else final_answer)(prediction)

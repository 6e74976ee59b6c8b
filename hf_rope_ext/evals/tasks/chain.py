"""A chain of small sums spread over a text: answered directly, step by step, or by majority."""

import itertools
import random
from dataclasses import dataclass
from typing import Any, Literal

from hf_rope_ext.checks import require_choice, require_integer, require_number
from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Place
from hf_rope_ext.evals.tasks.prose import sentences
from hf_rope_ext.evals.tasks.scorers import final_answer, first_number, majority

NAMES = [
    "amber", "basil", "cedar", "denim", "ember", "flint", "grove", "hazel", "ivory", "jasper",
    "kelp", "lotus", "maple",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Chain(DocumentTask):
    """A chain of sums spread over prose: each number is the previous one plus a small one.

    Args:
        mode: ``"direct"``, ``"cot"`` (chain of thought, Wei et al., 2022, arXiv:2201.11903) or
            ``"maj"`` (self-consistency, Wang et al., 2022, arXiv:2203.11171).
        hops: Number of sums between the first and the requested number.
        n: Samples per question for ``"maj"``.
        temperature: Sampling temperature for ``"maj"``.
        haystack: UTF-8 text file to spread the statements over; generated prose if empty.
    """

    max_new_tokens: int = 8
    mode: Literal["direct", "cot", "maj"] = "direct"
    hops: int = 3
    n: int = 8
    temperature: float = 0.7
    haystack: str = ""

    def check(self) -> None:
        """Check the options."""
        require_choice("mode", self.mode, ("direct", "cot", "maj"))
        require_integer("hops", self.hops, 1, len(NAMES) - 1)
        require_integer("n", self.n, 1)
        require_number("temperature", self.temperature, above=0)

    @property
    def sampling(self) -> dict[str, Any] | None:
        """Sampling settings for generation; None for greedy decoding."""
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
        """Return 1 if the number is correct: the first of a direct answer, else the final one."""
        return {"score": float(self._answer(prediction) == gold[0])}

    def score_samples(self, gold: tuple[str, ...], predictions: list[str]) -> dict[str, float]:
        """Return maj@n as the score, the fraction of votes for it, and pass@1."""
        answers = [self._answer(prediction) for prediction in predictions]
        winner, confidence = majority(answers)
        return {
            "score": float(winner == gold[0]),
            "confidence": confidence,
            "pass@1": sum(answer == gold[0] for answer in answers) / len(answers),
        }

    def _answer(self, prediction: str) -> str | None:
        return (first_number if self.mode == "direct" else final_answer)(prediction)

"""Numbers and sequences beyond what was shown: addition, comparison, copying, sorting."""

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.base import Draft, Kind, Place, Task
from hf_rope_ext.evals.tasks.scorers import first_number

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    """Worked examples over a trained range fill the context; the question is inside or beyond it.

    Args:
        operation: ``"add"`` two numbers, or ``"compare"`` them and name the larger.
        trained: Smallest and largest operand of the examples.
        beyond: Operands of the questions beyond; the other half lies in the trained range.
        digits: Digit counts of further questions, each a group of its own.
    """

    max_new_tokens: int = 12
    operation: Literal["add", "compare"] = "add"
    trained: Range = (0, 1000)
    beyond: Range = (1000, 10000)
    digits: tuple[int, ...] = ()

    smallest = 1

    def cells(self) -> list[tuple[float | None, str | None]]:
        """Return one cell per range of operands."""
        return [(None, group) for group in self._ranges()]

    def check(self) -> None:
        """Check the ranges."""
        for first, last in self._ranges().values():
            if not 0 <= first < last:
                raise RopeError(f"operands must be from a smaller to a larger, got {first, last}.")

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return ``size`` worked examples and a question."""
        a, b = self._operands(draw, self._ranges()[place.group or "inside"])
        examples = []
        for _ in range(size):
            x, y = self._operands(draw, self.trained)
            examples.append(f"{self._question(x, y)} {self._result(x, y)}\n")
        result = str(self._result(a, b))
        return Draft(
            prompt="".join(examples) + self._question(a, b),
            target=f" {result}",
            gold=(result,),
            metadata={"operands": [a, b]},
        )

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the first number is the result."""
        return {"score": float(first_number(prediction) == gold[0])}

    def _ranges(self) -> dict[str, Range]:
        named = {f"{count} digits": (10 ** (count - 1), 10**count - 1) for count in self.digits}
        return {"inside": self.trained, "beyond": self.beyond, **named}

    def _operands(self, draw: random.Random, within: Range) -> tuple[int, int]:
        a, b = draw.randint(*within), draw.randint(*within)
        while self.operation == "compare" and a == b:
            b = draw.randint(*within)
        return a, b

    def _question(self, a: int, b: int) -> str:
        return f"{a} + {b} =" if self.operation == "add" else f"The larger of {a} and {b} is"

    def _result(self, a: int, b: int) -> int:
        return a + b if self.operation == "add" else max(a, b)


@dataclass(frozen=True, kw_only=True)
class ItemSequence(Task):
    """Copy or sort a sequence that grows with the length.

    The answer is begun; the model is scored on the rest, teacher-forced: for a copy each word must
    be found ``size`` words back, for sorting the largest numbers must be picked from the whole.

    Args:
        operation: ``"copy"`` random words, or ``"sort"`` different numbers in ascending order.
        asked: How many items are scored.
    """

    kind: ClassVar[Kind] = "loglikelihood"
    smallest = 8

    operation: Literal["copy", "sort"] = "copy"
    asked: int = 4

    def check(self) -> None:
        """Check how many items are asked for."""
        if not 1 <= self.asked <= self.smallest:
            raise RopeError(f"asked must be from 1 to {self.smallest}, got {self.asked!r}.")

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a sequence of ``size`` items."""
        if self.operation == "copy":
            items = ["".join(draw.choices("bcdfghklmnprstvz", k=3)) for _ in range(size)]
            result, cue = items, "Copy:"
        else:
            # five digits each, so that a longer sequence is never fewer tokens
            numbers = draw.sample(range(10000, 100000), min(size, 90000))
            items, cue = [str(one) for one in numbers], "Sorted:"
            result = [str(one) for one in sorted(numbers)]
        begun, rest = result[: -self.asked], result[-self.asked :]
        return Draft(
            prompt=f"Sequence: {' '.join(items)}",
            answer="\n" + " ".join((cue, *begun)),
            target=" " + " ".join(rest),
            gold=(" ".join(rest),),
        )

    def largest(self, place: Place) -> int:
        """Return the most items there can be."""
        return 90000

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the prediction begins with the right items."""
        return {"score": float(prediction.split()[: self.asked] == gold[0].split())}

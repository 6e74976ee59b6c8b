"""Length and range generalization: addition, comparison, copying, sorting."""

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_rope_ext.checks import require_choice, require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Kind, Place
from hf_rope_ext.evals.tasks.scorers import first_number

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Arithmetic(DocumentTask):
    """Sums or comparisons inside and beyond the range of the worked examples (unit: an example).

    Args:
        operation: ``"add"`` two numbers, or ``"compare"`` them and name the larger one.
        trained: Smallest and largest operand of the examples.
        beyond: Range of operands of the second group of questions; those of the first are trained.
        digits: Digit counts of further groups of questions.
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
        """Check the options."""
        require_choice("operation", self.operation, ("add", "compare"))
        for first, last in self._ranges().values():
            if not 0 <= first < last:
                raise RopeError(f"operands must range from smaller to larger, got {first, last}.")

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
        by_digits = {f"{n} digits": (10 ** (n - 1), 10**n - 1) for n in self.digits}
        return {"inside": self.trained, "beyond": self.beyond, **by_digits}

    def _operands(self, draw: random.Random, limits: Range) -> tuple[int, int]:
        a, b = draw.randint(*limits), draw.randint(*limits)
        while self.operation == "compare" and a == b:
            b = draw.randint(*limits)
        return a, b

    def _question(self, a: int, b: int) -> str:
        return f"{a} + {b} =" if self.operation == "add" else f"The larger of {a} and {b} is"

    def _result(self, a: int, b: int) -> int:
        return a + b if self.operation == "add" else max(a, b)


@dataclass(frozen=True, kw_only=True)
class ItemSequence(DocumentTask):
    """Copy or sort a sequence that fills the length, scored on the last items (unit: an item).

    All but the last items of the answer are given. Copying looks up each word ``size`` words back;
    sorting selects the largest numbers of the whole sequence.

    Args:
        operation: ``"copy"`` random words, or ``"sort"`` distinct numbers in ascending order.
        asked: Number of items scored.
    """

    kind: ClassVar[Kind] = "loglikelihood"
    smallest = 8

    operation: Literal["copy", "sort"] = "copy"
    asked: int = 4

    def check(self) -> None:
        """Check the options."""
        require_choice("operation", self.operation, ("copy", "sort"))
        require_integer("asked", self.asked, 1, self.smallest)

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a sequence of ``size`` items."""
        if self.operation == "copy":
            items = ["".join(draw.choices("bcdfghklmnprstvz", k=3)) for _ in range(size)]
            result, cue = items, "Copy:"
        else:
            # five digits each, so that the token count never falls with the size
            numbers = draw.sample(range(10000, 100000), min(size, 90000))
            items, cue = [str(number) for number in numbers], "Sorted:"
            result = [str(number) for number in sorted(numbers)]
        given, rest = result[: -self.asked], result[-self.asked :]
        return Draft(
            prompt=f"Sequence: {' '.join(items)}",
            answer="\n" + " ".join((cue, *given)),
            target=" " + " ".join(rest),
            gold=(" ".join(rest),),
        )

    def largest(self, place: Place) -> int:
        """Return the maximum number of items."""
        return 90000

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the prediction starts with the correct items."""
        return {"score": float(prediction.split()[: self.asked] == gold[0].split())}

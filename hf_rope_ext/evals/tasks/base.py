"""What a task is: drafts of any size, the fit of a draft to a length, and a pure scorer."""

import abc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.text import encode, require_answer

Kind = Literal["generate", "loglikelihood"]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Place:
    """Where a document belongs in the grid of a task.

    Args:
        length: Its budget in tokens.
        depth: Where the needle is, 0 (start) to 1 (end); None where the task has no depths.
        group: What it is reported under beside its length; None where the task has no groups.
        index: Of the sample.
    """

    length: int
    depth: float | None = None
    group: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Draft:
    """A question at one size, before it is known whether it fits.

    Args:
        prompt: Context and question.
        answer: The beginning of the answer, which the model continues.
        target: The rest of the right answer, for teacher-forced scoring.
        gold: What a prediction is held against.
        metadata: What else a report may want to know.
    """

    prompt: str
    answer: str = ""
    target: str = ""
    gold: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """One kind of question; subclasses are frozen dataclasses whose fields are its options.

    Args:
        max_new_tokens: Tokens kept free for a generated answer.
        template_tokens: Tokens kept free for a chat template.
    """

    kind: ClassVar[Kind] = "generate"
    smallest: ClassVar[int] = 0

    max_new_tokens: int = 32
    template_tokens: int = 0

    @abc.abstractmethod
    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a question whose context has ``size`` units; more units are never fewer tokens."""

    @abc.abstractmethod
    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return the scores of a prediction, ``"score"`` among them."""

    @property
    def sampling(self) -> dict[str, Any] | None:
        """How answers are sampled; None for greedy decoding."""
        return None

    def largest(self, place: Place) -> int:
        """Return the most units there can be."""
        return 1 << 40

    def cells(self) -> list[tuple[float | None, str | None]]:
        """Return the depths and groups that are measured at every length."""
        return [(None, None)]

    def check(self) -> None:  # noqa: B027 - most tasks need nothing
        """Raise `RopeError` if an option is out of range or something needed is missing."""

    def score_samples(self, gold: tuple[str, ...], predictions: list[str]) -> dict[str, float]:
        """Return the scores of several sampled answers to one question."""
        scores = [self.score(gold, one) for one in predictions]
        return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


@dataclass(frozen=True, kw_only=True)
class DepthTask(Task):
    """A task that hides something at a depth.

    Args:
        depths: Where, 0 (start) to 1 (end).
    """

    depths: tuple[float, ...] = DEPTHS

    def cells(self) -> list[tuple[float | None, str | None]]:
        """Return one cell per depth."""
        return [(depth, None) for depth in self.depths]

    def check(self) -> None:
        """Check the depths."""
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise RopeError(f"depths must be numbers from 0 to 1, got {self.depths!r}.")


def build(
    name: str, task: Task, tokenizer: Any, lengths: list[int], samples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the documents of a task, with lengths and depths interleaved."""
    guesses: dict[tuple[int, str | None], int] = {}
    for index in range(samples):
        for depth, group in task.cells():
            for length in lengths:
                place = Place(length, depth, group, index)
                key = (length, group)
                document, guesses[key] = _fitted(name, task, tokenizer, place, seed, guesses)
                yield document


def _fitted(
    name: str,
    task: Task,
    tokenizer: Any,
    place: Place,
    seed: int,
    guesses: dict[tuple[int, str | None], int],
) -> tuple[dict[str, Any], int]:
    """Return the largest document that fits, and its size."""
    stream = f"{seed}/{name}/{place.length}/{place.depth}/{place.group}/{place.index}"

    def at(size: int) -> Draft:
        return task.draft(random.Random(stream), size, place)

    def tokens(size: int) -> int:
        return needed(task, tokenizer, at(size))

    guess = guesses.get((place.length, place.group), place.length // 16)
    limits = (task.smallest, task.largest(place))
    size = fit(tokens, place.length, limits, guess)
    if size is None:
        raise RopeError(
            f"{name}: a length of {place.length} has no room for the task, which takes at least "
            f"{tokens(task.smallest)} tokens of this tokenizer, the answer's included."
        )
    found = at(size)
    for answer in found.gold:
        require_answer(tokenizer, answer, name)
    used = len(encode(tokenizer, found.prompt + found.answer))
    return {
        "task": name,
        "length": place.length,
        "index": place.index,
        "depth": place.depth,
        "group": place.group,
        "kind": task.kind,
        "prompt": found.prompt,
        "answer": found.answer,
        "target": found.target,
        "gold": list(found.gold),
        "max_new_tokens": task.max_new_tokens,
        "tokens": used,
        "sampling": task.sampling,
        "metadata": {"seed": seed, "size": size, **found.metadata},
    }, size


def needed(task: Task, tokenizer: Any, draft: Draft) -> int:
    """Return the tokens a draft takes, its answer and a chat template included."""
    asked = draft.prompt + draft.answer
    if task.kind == "loglikelihood":
        return task.template_tokens + len(encode(tokenizer, asked + draft.target))
    return task.template_tokens + len(encode(tokenizer, asked)) + task.max_new_tokens


def fit(
    tokens: Callable[[int], int], budget: int, limits: tuple[int, int], guess: int
) -> int | None:
    """Return a size that fits while one unit more does not, or the largest size if that fits.

    A binary search whose first steps go where the tokens per unit seen so far point.

    Args:
        tokens: Tokens of a size.
        budget: The most tokens allowed.
        limits: Smallest and largest size.
        guess: A size to start near.

    Returns:
        The size; None if the smallest does not fit.
    """
    smallest, largest = limits
    low, low_tokens = smallest, tokens(smallest)
    if low_tokens > budget:
        return None
    high = largest + 1
    size = min(max(guess, smallest + 1), largest)
    for step in range(200):
        if high - low <= 1:
            break
        found = tokens(size)
        if found > budget:
            high = size
        else:
            low = size
        if size > smallest and found > low_tokens and step < 8:
            unit = (found - low_tokens) / (size - smallest)
            size = smallest + int((budget - low_tokens) / unit)
        else:
            size = (low + high) // 2 if high <= largest else 2 * low + 1
        size = min(max(size, low + 1), max(high - 1, low + 1))
    return low

"""The kinds of evaluation tasks, and the questions they draft."""

import abc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from hf_rope_ext.checks import require_bool, require_choice, require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.bench import Advance, Bench
from hf_rope_ext.evals.tasks.frames import GRID, Frame
from hf_rope_ext.evals.tasks.scorers import string_match_all

Kind = Literal["generate", "loglikelihood"]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Place:
    """Position of a question in the grid of a task.

    Args:
        length: Context length in tokens, answer included.
        depth: Relative position of the needle, 0 (start) to 1 (end); None without depths.
        group: Label of a subset that is also reported separately; None without groups.
        index: Number of the sample.
    """

    length: int
    depth: float | None = None
    group: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Draft:
    """A question of a given size, not yet known to fit the context length.

    Args:
        prompt: Context and question.
        answer: Opening of the answer, which the model continues.
        target: Rest of the correct answer, for teacher forcing.
        gold: Reference answers.
        metadata: Further fields for reports.
    """

    prompt: str
    answer: str = ""
    target: str = ""
    gold: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """An evaluation task; subclasses are frozen dataclasses whose fields are its options."""

    metric: ClassVar[str] = "score"
    """Key of the number that tables and plots show."""

    def check(self) -> None:
        """Raise `RopeError` if an option is out of range or required data is missing."""


@dataclass(frozen=True, kw_only=True)
class TextTask(Task, abc.ABC):
    """A quantity measured on the tokens of a text, in forward passes only."""

    def lengths(self, bench: Bench, requested: tuple[int, ...]) -> tuple[int, ...]:
        """Return the context lengths to measure at."""
        return requested

    @abc.abstractmethod
    def require_text(self, bench: Bench) -> None:
        """Raise `RopeError` if the text is too short or the tokenizer unsuitable."""

    @abc.abstractmethod
    def units(self, bench: Bench, length: int) -> int:
        """Return the number of samples per cell.

        Raises:
            RopeError: If the length is too short for the task.
        """

    @abc.abstractmethod
    def measure(
        self, bench: Bench, model: nn.Module, length: int, size: int, advance: Advance
    ) -> dict[str, Any]:
        """Return the results of one cell, from batches of at most ``size`` rows."""


@dataclass(frozen=True, kw_only=True)
class QuestionTask(Task, abc.ABC):
    """A task of questions that fill a context length exactly.

    Args:
        max_new_tokens: Tokens reserved for a generated answer.
        template_tokens: Tokens reserved for a chat template.
    """

    max_new_tokens: int = 32
    template_tokens: int = 0

    @abc.abstractmethod
    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a question over ``size`` units; its token count must not fall with ``size``."""

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return the scores of a prediction; by default the fraction of answers it contains."""
        return {"score": string_match_all(prediction, gold)}

    def cells(self) -> list[tuple[float | None, str | None]]:
        """Return the (depth, group) pairs to measure at every length."""
        return [(None, None)]


@dataclass(frozen=True, kw_only=True)
class DocumentTask(QuestionTask):
    """A question task in plain text."""

    kind: ClassVar[Kind] = "generate"
    smallest: ClassVar[int] = 0

    @property
    def sampling(self) -> dict[str, Any] | None:
        """Sampling settings for generation; None for greedy decoding."""
        return None

    def largest(self, place: Place) -> int:
        """Return the maximum number of units."""
        return 1 << 40

    def score_samples(self, gold: tuple[str, ...], predictions: list[str]) -> dict[str, float]:
        """Return the combined scores of several sampled answers to one question."""
        scores = [self.score(gold, prediction) for prediction in predictions]
        return {name: sum(row[name] for row in scores) / len(scores) for name in scores[0]}


@dataclass(frozen=True, kw_only=True)
class DepthTask(DocumentTask):
    """A document task that hides something at a depth.

    Args:
        depths: Relative positions, 0 (start) to 1 (end).
    """

    depths: tuple[float, ...] = DEPTHS

    def cells(self) -> list[tuple[float | None, str | None]]:
        """Return one cell per depth."""
        return [(depth, None) for depth in self.depths]

    def check(self) -> None:
        """Check the depths."""
        require_depths(self.depths)


@dataclass(frozen=True, kw_only=True)
class FrameDraft(Draft):
    """A question about frames, which are shown between ``opening`` and ``prompt``.

    Args:
        frames: The frames, in order.
        opening: Text before the frames.
    """

    frames: tuple[Frame, ...] = ()
    opening: str = "These are the frames of a film, in order."


@dataclass(frozen=True, kw_only=True)
class FrameTask(QuestionTask):
    """A question task over drawn frames, for models that take images.

    Args:
        depths: Relative positions of the frame in question, 0 (start) to 1 (end).
        generated: Whether the answer is generated instead of teacher-forced.
        media: ``"images"``, shown one by one, or ``"video"``, in the format of the processor.
        pixels: Height and width of a frame.
    """

    max_new_tokens: int = 8
    depths: tuple[float, ...] = DEPTHS
    generated: bool = False
    media: Literal["images", "video"] = "images"
    pixels: int = 112

    @abc.abstractmethod
    def draft(self, draw: random.Random, size: int, place: Place) -> FrameDraft:
        """Return a question about ``size`` frames."""

    def cells(self) -> list[tuple[float | None, str | None]]:
        """Return one cell per depth."""
        return [(depth, None) for depth in self.depths]

    def check(self) -> None:
        """Check the options."""
        require_depths(self.depths)
        require_bool("generated", self.generated)
        require_choice("media", self.media, ("images", "video"))
        require_integer("pixels", self.pixels, 8 * GRID)


def require_depths(depths: Sequence[float]) -> None:
    """Check that depths are numbers from 0 to 1.

    Raises:
        RopeError: If they are not, or there are none.
    """
    if not isinstance(depths, tuple | list) or not depths:
        raise RopeError(f"depths must be a list of numbers from 0 to 1, got {depths!r}.")
    for depth in depths:
        require_number("each of depths", depth, least=0, most=1)

"""A card in one of many frames: V-NIAH and, with other cards among them, V-NIAH-D.

After LongVA (Zhang et al., 2024, arXiv:2406.16852), which puts a picture into a long video and asks
about it, and VideoRoPE (Wei et al., 2025, arXiv:2502.05173), which adds distractors at a fixed
distance from each other. Both use photographs; here everything is drawn.
"""

import random
from dataclasses import dataclass
from typing import Literal

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.base import DepthTask, Draft, Place
from hf_rope_ext.evals.tasks.frames import COLORS, GRID, Card, Frame
from hf_rope_ext.evals.tasks.scorers import first_number

Asks = Literal["digit", "row", "column"]
NAMES: dict[str, tuple[str, ...]] = {
    "row": ("top", "middle", "bottom"),
    "column": ("left", "center", "right"),
}
OPENING = "These are the frames of a film, in order."


@dataclass(frozen=True, kw_only=True)
class FilmDraft(Draft):
    """A question about frames, which stand between opening and prompt.

    Args:
        frames: In order.
        opening: The text before them.
    """

    frames: tuple[Frame, ...] = ()
    opening: str = OPENING


@dataclass(frozen=True, kw_only=True)
class VisualNeedle(DepthTask):
    """A card in one of many drawn frames, for models that take images; in ``_d`` among others.

    Args:
        asks: What of the card: its digit, which only reading it tells, or its row or column in
            the frame, which positions along one axis tell.
        period: Frames from the card to the nearest other cards, and on from each to the next;
            these have other colors and other digits. 0 for none.
        generated: Whether the answer is generated; teacher-forced if not.
        media: ``"images"``, one by one, or ``"video"``, in the way the model's processor takes one.
        pixels: Height and width of a frame.
    """

    max_new_tokens: int = 8
    asks: Asks = "digit"
    period: int = 0
    generated: bool = False
    media: Literal["images", "video"] = "images"
    pixels: int = 112

    def check(self) -> None:
        """Check the options."""
        super().check()
        for name, known in (("asks", ("digit", *NAMES)), ("media", ("images", "video"))):
            value = getattr(self, name)
            if value not in known:
                raise RopeError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        for name, least in (("period", 0), ("pixels", 8 * GRID)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise RopeError(
                    f"{name} must be a whole number of at least {least}, got {value!r}."
                )

    def draft(self, draw: random.Random, size: int, place: Place) -> FilmDraft:
        """Return a question about ``size`` frames."""
        color, *others = draw.sample(list(COLORS), len(COLORS))
        digit, *wrong = draw.sample(range(10), 10)
        card = Card(digit, color, draw.randrange(GRID), draw.randrange(GRID))
        scenes = draw.getrandbits(64)
        at = round((place.depth or 0.0) * (size - 1))

        def frame(number: int) -> Frame:
            scene = f"{scenes}/{number}"
            steps, rest = divmod(number - at, self.period) if self.period else (0, 1)
            if number == at:
                return Frame(scene, card)
            if rest:
                return Frame(scene)
            own = random.Random(f"{scene}/card")
            return Frame(
                scene,
                Card(
                    wrong[steps % len(wrong)],
                    others[steps % len(others)],
                    own.randrange(GRID),
                    own.randrange(GRID),
                ),
            )

        question, answer, target = self._question(card)
        return FilmDraft(
            frames=tuple(frame(number) for number in range(size)),
            prompt=question,
            answer=answer,
            target=f" {target}",
            gold=(target,),
            metadata={"frames": size, "frame": at},
        )

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the first number, or the first name of a row or column, is the right one."""
        if self.asks == "digit":
            return {"score": float(first_number(prediction) == gold[0])}
        words = prediction.lower().replace(".", " ").replace(",", " ").split()
        named = next((word for word in words if word in NAMES[self.asks]), None)
        return {"score": float(named == gold[0])}

    def _question(self, card: Card) -> tuple[str, str, str]:
        """Return question, beginning of the answer, and its rest."""
        about = f"One frame shows a card with a {card.color} digit."
        if self.asks == "digit":
            return f"{about} Which digit is it?", f"The {card.color} digit is", str(card.digit)
        names = NAMES[self.asks]
        listed = ", ".join(names[:-1]) + " or " + names[-1]
        number = card.row if self.asks == "row" else card.column
        return (
            f"{about} Is the card in the {listed} {self.asks} of its frame?",
            f"The {self.asks} is the one at the",
            names[number],
        )

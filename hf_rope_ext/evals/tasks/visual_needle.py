"""A card in one of many frames: V-NIAH and, with distractor cards, V-NIAH-D.

After LongVA (Zhang et al., 2024, arXiv:2406.16852), which inserts an image into a long video and
asks about it, and VideoRoPE (Wei et al., 2025, arXiv:2502.05173), which adds distractors at a fixed
period. Both use photographs; here everything is drawn.
"""

import random
from dataclasses import dataclass
from typing import Literal

from hf_rope_ext.checks import require_choice, require_integer
from hf_rope_ext.evals.tasks.base import FrameDraft, FrameTask, Place
from hf_rope_ext.evals.tasks.frames import COLORS, GRID, Card, Frame
from hf_rope_ext.evals.tasks.scorers import first_number

Asks = Literal["digit", "row", "column"]
NAMES: dict[str, tuple[str, ...]] = {
    "row": ("top", "middle", "bottom"),
    "column": ("left", "center", "right"),
}


@dataclass(frozen=True, kw_only=True)
class VisualNeedle(FrameTask):
    """A card in one of many drawn frames; ``_d`` adds distractor cards.

    Args:
        asks: Property of the card in question: its digit, which must be read, or its row or column
            in the frame, which follows from positions along one axis.
        period: Distance in frames between consecutive cards; distractors differ from the card in
            color and digit. 0 for no distractors.
    """

    asks: Asks = "digit"
    period: int = 0

    def check(self) -> None:
        """Check the options."""
        super().check()
        require_choice("asks", self.asks, ("digit", *NAMES))
        require_integer("period", self.period, 0)

    def draft(self, draw: random.Random, size: int, place: Place) -> FrameDraft:
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
            shuffle = random.Random(f"{scene}/card")
            return Frame(
                scene,
                Card(
                    wrong[steps % len(wrong)],
                    others[steps % len(others)],
                    shuffle.randrange(GRID),
                    shuffle.randrange(GRID),
                ),
            )

        question, answer, target = self._question(card)
        return FrameDraft(
            frames=tuple(frame(number) for number in range(size)),
            prompt=question,
            answer=answer,
            target=f" {target}",
            gold=(target,),
            metadata={"frames": size, "frame": at},
        )

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the first number, or the first row or column named, is correct."""
        if self.asks == "digit":
            return {"score": float(first_number(prediction) == gold[0])}
        words = prediction.lower().replace(".", " ").replace(",", " ").split()
        answer = next((word for word in words if word in NAMES[self.asks]), None)
        return {"score": float(answer == gold[0])}

    def _question(self, card: Card) -> tuple[str, str, str]:
        """Return question, opening of the answer, and its target."""
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

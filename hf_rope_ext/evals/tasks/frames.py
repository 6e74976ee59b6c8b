"""Frames drawn from rectangles: scenes, and cards that show a colored digit; needs Pillow."""

import random
from dataclasses import dataclass
from typing import Any

from hf_rope_ext.errors import RopeError

COLORS = {
    "red": (215, 30, 30),
    "blue": (35, 60, 215),
    "green": (25, 145, 45),
    "black": (15, 15, 15),
    "pink": (240, 80, 200),
}
GRID = 3
"""Rows and columns of the grid that cards are placed on."""

# lit segments of each digit: top, upper left, upper right, middle, lower left, lower right,
# bottom; this avoids depending on a font
SEGMENTS = [
    "1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010",
    "1111111", "1111011",
]  # fmt: skip
# left, top, right, bottom of each segment, relative to the card
STROKES = (
    (0.26, 0.10, 0.74, 0.22),
    (0.20, 0.10, 0.34, 0.56),
    (0.66, 0.10, 0.80, 0.56),
    (0.26, 0.44, 0.74, 0.56),
    (0.20, 0.44, 0.34, 0.90),
    (0.66, 0.44, 0.80, 0.90),
    (0.26, 0.78, 0.74, 0.90),
)


@dataclass(frozen=True)
class Card:
    """A digit on white, in one of `GRID` x `GRID` cells of a frame.

    Args:
        digit: The digit, 0 to 9.
        color: One of `COLORS`.
        row: Row of the grid, from the top.
        column: Column of the grid, from the left.
    """

    digit: int
    color: str
    row: int
    column: int


@dataclass(frozen=True)
class Frame:
    """The content of a frame.

    Args:
        scene: Seed of the dull background rectangles.
        card: The card in front of them.
    """

    scene: str
    card: Card | None = None


def draw_frame(frame: Frame, pixels: int) -> Any:
    """Return a frame as a Pillow image of ``pixels x pixels``.

    Raises:
        RopeError: If Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise RopeError("drawn frames need Pillow: pip install 'hf-rope-ext[vision]'") from error
    draw = random.Random(frame.scene)
    image = Image.new("RGB", (pixels, pixels), _dull(draw))
    brush = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = (draw.uniform(-0.2, 0.9) for _ in range(2))
        box = (left, top, left + draw.uniform(0.2, 0.7), top + draw.uniform(0.2, 0.7))
        brush.rectangle([round(side * pixels) for side in box], fill=_dull(draw))
    if frame.card is not None:
        _draw_card(brush, frame.card, pixels)
    return image


def _draw_card(brush: Any, card: Card, pixels: int) -> None:
    side = pixels / GRID
    left, top = card.column * side, card.row * side

    def rectangle(box: tuple[float, float, float, float], fill: tuple[int, int, int]) -> None:
        x0, y0, x1, y1 = map(round, box)
        brush.rectangle([x0, y0, x1 - 1, y1 - 1], fill=fill)

    rectangle((left, top, left + side, top + side), (255, 255, 255))
    for lit, (x0, y0, x1, y1) in zip(SEGMENTS[card.digit], STROKES, strict=True):
        if lit == "1":
            box = (left + x0 * side, top + y0 * side, left + x1 * side, top + y1 * side)
            rectangle(box, COLORS[card.color])


def _dull(draw: random.Random) -> tuple[int, int, int]:
    """Return a color that no card has."""
    gray = draw.randrange(110, 190)
    red, green, blue = (gray + draw.randrange(-20, 21) for _ in range(3))
    return red, green, blue

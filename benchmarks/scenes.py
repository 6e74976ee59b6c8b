"""Drawn videos with questions that each depend on a single position axis.

A video shows 8 scenes on a grid of 3 x 3 cells. In each frame, random cells show the digit of the
scene, the letter of their row, the letter of their column, or meaningless marks. Letters of rows
and columns stay the same throughout the video. The digit of scene k is thus identified by t alone,
the letter of row r by h alone, that of column c by w alone.
"""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

SCENES, SIDE, CHOICES = 8, 3, 8
DIGITS, ROWS, COLUMNS, MARKS = "01234567", "ABCDEFGH", "STUVWXYZ", "!#$%&()*+-/<=>?@"
GLYPHS = DIGITS + ROWS + COLUMNS + MARKS
PATCH, MERGE, TEMPORAL = 8, 2, 2
CELL = PATCH * MERGE
JITTER = 3
"""Glyphs are drawn at one of JITTER x JITTER positions in their cell."""

START, VISION_START, VIDEO_PAD, IMAGE_PAD = range(4)
FIRST_QUESTION = 4
QUESTIONS = SCENES + 2 * SIDE
FIRST_ANSWER = FIRST_QUESTION + QUESTIONS
VOCABULARY = FIRST_ANSWER + 3 * CHOICES
AXES = {
    "t": slice(0, SCENES),
    "h": slice(SCENES, SCENES + SIDE),
    "w": slice(SCENES + SIDE, QUESTIONS),
}
"""The questions that depend on each axis."""


@dataclass(frozen=True)
class Videos:
    """Videos of the same shape, with the answers to all questions.

    Attributes:
        glyphs: ``(batch, frames, rows, columns)``, indices into ``GLYPHS``.
        answers: ``(batch, questions)`` token ids: scenes, then rows, then columns.
    """

    glyphs: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.glyphs)

    def __getitem__(self, some: slice) -> "Videos":
        return Videos(self.glyphs[some], self.answers[some])

    @property
    def grid(self) -> Tensor:
        """Patch grid of each video, ``(batch, 3)``: frames, height, width."""
        frames, rows, columns = self.glyphs.shape[1:]
        return torch.tensor([[frames, MERGE * rows, MERGE * columns]] * len(self))


def videos(
    generator: Generator,
    batch: int,
    *,
    scenes: int = SCENES,
    hold: int = 1,
    zoom: int = 1,
    first: int = 0,
) -> Videos:
    """Return random videos.

    Args:
        generator: Random number generator.
        batch: Number of videos.
        scenes: Scenes per video.
        hold: Frames per scene.
        zoom: Cells per row and column of the 3 x 3 grid.
        first: The scene of question 0.
    """

    def choose(*shape: int) -> Tensor:
        return torch.randint(CHOICES, (batch, *shape), generator=generator)

    digits, rows, columns = choose(scenes), choose(SIDE), choose(SIDE)
    frames, side = scenes * hold, SIDE * zoom
    shape = (batch, frames, side, side)
    shown = [
        digits.repeat_interleave(hold, 1)[:, :, None, None],
        CHOICES + rows.repeat_interleave(zoom, 1)[:, None, :, None],
        2 * CHOICES + columns.repeat_interleave(zoom, 1)[:, None, None, :],
        3 * CHOICES + torch.randint(len(MARKS), shape, generator=generator),
    ]
    kinds = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3]).repeat(zoom**2)
    order = torch.rand(batch, frames, side * side, generator=generator).argsort(-1)
    kind = kinds[order].view(shape)
    glyphs = torch.stack([glyph.expand(shape) for glyph in shown]).gather(0, kind[None])[0]
    answers = torch.cat(
        [digits[:, first : first + SCENES], CHOICES + rows, 2 * CHOICES + columns], 1
    )
    return Videos(glyphs, FIRST_ANSWER + answers)


def atlas() -> Tensor:
    """Return all glyphs at all positions in a cell, ``(glyphs, places, 3, CELL, CELL)`` bytes."""
    font = ImageFont.load_default_imagefont()
    drawn = []
    for glyph in GLYPHS:
        for place in range(JITTER**2):
            cell = Image.new("L", (CELL, CELL))
            corner = (4 + place % JITTER, 1 + place // JITTER)
            ImageDraw.Draw(cell).text(corner, glyph, fill=255, font=font)
            drawn.append(torch.frombuffer(bytearray(cell.tobytes()), dtype=torch.uint8))
    grey = torch.stack(drawn).view(len(GLYPHS), JITTER**2, 1, CELL, CELL)
    return grey.expand(-1, -1, 3, -1, -1)


def places(glyphs: Tensor, generator: Generator) -> Tensor:
    """Return a random position in its cell for each glyph."""
    return torch.randint(JITTER**2, glyphs.shape, generator=generator)


def draw(glyphs: Tensor, generator: Generator) -> Tensor:
    """Return frames as pixels, ``(batch, frames, 3, height, width)`` bytes."""
    cells = atlas()[glyphs, places(glyphs, generator)]
    batch, frames, rows, columns = glyphs.shape
    return cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, frames, 3, CELL * rows, CELL * columns)


def patches(frames: Tensor) -> Tensor:
    """Return pixels in the layout of Qwen2-VL's processors, repeating each frame TEMPORAL times.

    Args:
        frames: ``(batch, frames, 3, height, width)`` bytes.

    Returns:
        ``(batch * frames * patches, 3 * TEMPORAL * PATCH * PATCH)``, grouped by cell.
    """
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    batch, count, _, height, width = frames.shape
    cells = ((frames / 255 - mean) / std).view(
        batch, count, 3, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH
    )
    cells = cells.permute(0, 1, 3, 6, 4, 7, 2, 5, 8)[..., None, :, :]
    return cells.expand(*cells.shape[:7], TEMPORAL, PATCH, PATCH).reshape(
        -1, 3 * TEMPORAL * PATCH * PATCH
    )

"""Placement of visual tokens: rules that modify the positions a family computes.

Scaling frequencies affects every distance along an axis, including that from a video to the
question after it. A video that is merely sampled more densely than in training, or a frame that is
merely larger, is served better by moving its tokens: they are placed over the positions seen in
training, and the text that follows is moved up behind them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.checks import require_bool, require_choice, require_number
from hf_rope_ext.errors import MethodParameterError, RopeError

AXES = ("t", "h", "w")
"""Time, height and width: the rows of ``position_ids`` ``(3, batch, seq)``."""


@dataclass(frozen=True)
class VisualPositions:
    """Where the tokens of images and videos are placed.

    A block of visual tokens starts at c, the position that a text token in its place would have.
    Within the block, the family counts frames k, rows and columns.

    Args:
        factor: Divisor of the positions within a block, above 0: one number for all axes, or one
            per axis (``{"t": 4}``). Axes on which a block has a single position are unaffected.
        centred: Whether to keep the centre of what used to be one step in place: ``(k + 0.5) /
            factor - 0.5`` steps instead of ``k / factor``.
        placement: ``"grid"``, the families' own: (c + k, c + row, c + col). ``"diagonal"``
            (VideoRoPE, arXiv:2502.05173, sec. 4.3): each frame is centred on its time, (t, t + row
            - floor((H - 1) / 2), t + col - floor((W - 1) / 2)) with t = c + stride * k.
            ``"reset"`` (MRoPE-I, arXiv:2510.23095, sec. 4.3): (c + k, row, col).
        stride: Positions between frames, relative to the family's own; VideoRoPE's delta.
        next_text: Where text resumes after a block. ``"spatial"``: at c plus the larger of height
            and width. ``"max"``: after the largest extent. ``"time"``: after the last frame.
            ``"tokens"``: as if each token took one position. By default ``"time"`` for
            ``"diagonal"``, otherwise the family's own.
    """

    factor: float | Mapping[str, float] = 1.0
    centred: bool = True
    placement: str = "grid"
    stride: float = 1.0
    next_text: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        factors = {"factor": self.factor}
        if isinstance(self.factor, Mapping):
            object.__setattr__(self, "factor", dict(self.factor))
            factors = {f"factor of {axis!r}": value for axis, value in self.factor.items()}
        where, error = "visual_positions", MethodParameterError
        for name, value in {"stride": self.stride, **factors}.items():
            require_number(f"{where}: {name}", value, above=0.0, error=error)
        require_choice(f"{where}: placement", self.placement, PLACEMENTS, error)
        require_choice(f"{where}: next_text", self.next_text, (None, *NEXT_TEXT), error)
        require_bool(f"{where}: centred", self.centred, error)

    def factors(self, axes: Sequence[str]) -> tuple[float, ...]:
        """Return the factor of each axis.

        Raises:
            MethodParameterError: If an axis that the rule needs is missing.
        """
        by_axis = self.factor if isinstance(self.factor, Mapping) else {}
        text_axes = NEXT_TEXT[self.next_text].axes if self.next_text else ()
        for axis in (*by_axis, *PLACEMENTS[self.placement].axes, *text_axes):
            if axis not in axes:
                raise MethodParameterError(
                    f"visual_positions: there is no axis {axis!r}; the positions of this model "
                    f"have {', '.join(map(repr, axes))}."
                )
        if isinstance(self.factor, Mapping):
            return tuple(float(by_axis.get(axis, 1.0)) for axis in axes)
        return (float(self.factor),) * len(axes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, as the constructor takes it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def place_visual_tokens(
    position_ids: Tensor,
    visual: Tensor,
    rule: VisualPositions,
    *,
    axes: Sequence[str] = AXES,
    next_text: str = "spatial",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Apply a placement rule to the positions that a family computed.

    Args:
        position_ids: The family's positions, ``(axes, batch, seq)``.
        visual: 0 for text tokens, otherwise the kind of visual token, ``(batch, seq)``; a run of
            tokens of one kind is one image or video.
        rule: Where to place visual tokens.
        axes: Names of the rows of ``position_ids``.
        next_text: The family's own rule, see `VisualPositions`.
        attention_mask: 0 for padding, ``(batch, seq)``.

    Returns:
        ``(axes, batch, seq)``; float32 if any position is fractional.

    Raises:
        RopeError: If the shapes do not match, or ``position_ids`` do not follow ``next_text``.
    """
    if position_ids.shape != (len(axes), *visual.shape):
        raise RopeError(
            f"position_ids of the axes {', '.join(axes)} have shape (axes, batch, seq) and visual "
            f"(batch, seq); got {tuple(position_ids.shape)} and {tuple(visual.shape)}."
        )
    factors, family_text = rule.factors(axes), NEXT_TEXT[next_text]
    text = NEXT_TEXT[rule.next_text or PLACEMENTS[rule.placement].next_text or next_text]
    # on the CPU, which has float64 and where the blocks can be looked at without synchronizing
    result = position_ids.to("cpu", torch.float64)
    mask = torch.ones_like(visual) if attention_mask is None else attention_mask
    for row, (row_kinds, kept) in enumerate(zip(visual.cpu(), mask.cpu().bool(), strict=True)):
        positions = result[:, row, kept].clone()
        shift = 0.0
        for start, end, kind in _runs(row_kinds[kept].tolist()):
            if not kind:
                positions[:, start:end] += shift
                continue
            first, block = positions[:, start].clone(), _Block(positions[:, start:end], axes)
            before = family_text.distance(block.extents((1.0,) * len(axes)), end - start)
            if end < positions.shape[1]:
                _require_rule(positions[:, end], family_text.start(first, end, before), next_text)
            positions[:, start:end] = block.place(first + shift, rule, factors)
            shift += text.distance(block.extents(factors, rule.stride), end - start) - before
        result[:, row, kept] = positions
    whole = bool((result == result.round()).all())
    return result.to(position_ids.device, position_ids.dtype if whole else torch.float32)


def _runs(kinds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and kind of each run of tokens of one kind."""
    start = 0
    for kind, run in itertools.groupby(kinds):
        end = start + len(list(run))
        yield start, end, kind
        start = end


class _Block:
    """A run of visual tokens of one image or video, relative to its first position."""

    def __init__(self, positions: Tensor, axes: Sequence[str]) -> None:
        self.axes = axes
        self.offsets = positions - positions[:, :1]
        levels = [sorted(set(along.tolist())) for along in self.offsets]
        # the distance of neighbouring positions on each axis; 0 for a single position
        self.steps = [level[1] - level[0] if len(level) > 1 else 0.0 for level in levels]

    def extents(self, factors: Sequence[float], stride: float = 1.0) -> dict[str, float]:
        """Return the extent on each axis: one position beyond the last of its steps."""
        extents = {}
        for along, step, axis, factor in zip(
            self.offsets, self.steps, self.axes, factors, strict=True
        ):
            extent = (float(along.max()) + step) / factor - step + 1 if step else 1.0
            extents[axis] = stride * (extent - 1) + 1 if axis == "t" else extent
        return extents

    def place(self, first: Tensor, rule: VisualPositions, factors: Sequence[float]) -> Tensor:
        """Return the positions, ``(axes, tokens)``, of a block placed at ``first``."""
        rows = []
        for along, step, factor, axis in zip(
            self.offsets, self.steps, factors, self.axes, strict=True
        ):
            half = step / 2 if rule.centred else 0.0
            scaled = (along + half) / factor - half
            rows.append(scaled * rule.stride if axis == "t" else scaled)
        placed = torch.stack(rows) + first[:, None]
        spatial = PLACEMENTS[rule.placement].spatial
        if spatial is not None:
            time = placed[self.axes.index("t")] if "t" in self.axes else None
            for row in (self.axes.index("h"), self.axes.index("w")):
                middle = math.floor(float(self.offsets[row].max()) / 2)
                centred = (self.offsets[row] - middle) / factors[row]
                placed[row] = spatial(rows[row], centred, time)
        return placed


def _require_rule(start: Tensor, expected: Tensor, next_text: str) -> None:
    """Check that the family resumed the text after a block where its rule says."""
    if not torch.equal(start, expected):
        raise RopeError(
            f"text resumes at {start.tolist()} after a visual block, but next_text={next_text!r} "
            f"implies {expected.tolist()}: these positions follow another rule, or the wrong "
            f"tokens are marked as visual. Nothing was changed."
        )


@dataclass(frozen=True)
class Placement:
    """The definition of a placement.

    Args:
        spatial: From positions relative to the start of a block, those relative to its middle, and
            those in time, to the positions on height or width; None to count from the start.
        axes: The axes it needs.
        next_text: Where text resumes by default; None for the family's own rule.
    """

    spatial: Callable[..., Tensor] | None = None
    axes: tuple[str, ...] = ()
    next_text: str | None = None


@dataclass(frozen=True)
class NextText:
    """A rule for where text resumes after a block.

    Args:
        axes: The axes whose largest extent decides; all when empty.
        by_tokens: Whether every token takes one position instead.
    """

    axes: tuple[str, ...] = ()
    by_tokens: bool = False

    def distance(self, extents: Mapping[str, float], tokens: int) -> float:
        """Return the distance from the start of a block to the text after it."""
        if self.by_tokens:
            return tokens
        return max(extents[axis] for axis in self.axes or extents)

    def start(self, first: Tensor, end: int, distance: float) -> Tensor:
        """Return the position, ``(axes,)``, of the text that follows ``end`` tokens of a row."""
        return torch.full_like(first, end) if self.by_tokens else first + distance


PLACEMENTS = {
    "grid": Placement(),
    "diagonal": Placement(lambda start, middle, time: time + middle, AXES, next_text="time"),
    "reset": Placement(lambda start, middle, time: start, axes=("h", "w")),
}
NEXT_TEXT = {
    "spatial": NextText(axes=("h", "w")),
    "max": NextText(),
    "time": NextText(axes=("t",)),
    "tokens": NextText(by_tokens=True),
}

"""Where visual tokens stand: a position rule of our own on top of a family's.

Frequencies move everything that turns by an axis, the question after a video included. A video
that is only sampled more densely than in training, or a frame that is only larger, is better served
by moving its tokens: they are placed as those of the trained density were, and the text that
follows is placed behind them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import MethodParameterError, RopeError
from hf_rope_ext.positions.layouts import AXES

PLACEMENTS = ("grid", "diagonal", "reset")
NEXT_TEXT = ("spatial", "max", "time", "tokens")


@dataclass(frozen=True)
class VisualPositions:
    """How the tokens of an image or a video are placed.

    A block of visual tokens begins at the position c that a token of text would have had. Within
    it a family counts frames, rows and columns: k, row and col.

    Args:
        factor: By what the positions within a block are divided, a number for all axes or one by
            axis (``{"t": 4}``), above 0. An axis along which a block has one position is left
            alone.
        centred: Whether the middle of what was one trained step stays where that was: ``(k + 0.5) /
            factor - 0.5``, in steps, and not ``k / factor``.
        placement: ``"grid"``, as the family does: (c + k, c + row, c + col). ``"diagonal"``
            (VideoRoPE, arXiv:2502.05173, sec. 4.3): every frame is centred on its own time, (t, t +
            row - floor((H - 1) / 2), t + col - floor((W - 1) / 2)) with t = c + stride * k.
            ``"reset"`` (MRoPE-I, arXiv:2510.23095, sec. 4.3): (c + k, row, col).
        stride: Positions between frames, in the family's own; VideoRoPE's delta.
        next_text: Where the text behind a block begins: ``"spatial"``, at c plus the larger of
            height and width; ``"max"``, behind the largest extent; ``"time"``, behind the last
            frame; ``"tokens"``, where it would begin if every token took one position. When not
            given, ``"time"`` for ``"diagonal"``, else the family's own.
    """

    factor: float | Mapping[str, float] = 1.0
    centred: bool = True
    placement: str = "grid"
    stride: float = 1.0
    next_text: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if isinstance(self.factor, Mapping):
            object.__setattr__(self, "factor", dict(self.factor))
        for name, value in {"stride": self.stride, **self._factors()}.items():
            if not _is_positive(value):
                raise MethodParameterError(
                    f"visual_positions: {name} must be a finite number above 0, got {value!r}."
                )
        for name, choices in (("placement", PLACEMENTS), ("next_text", (None, *NEXT_TEXT))):
            if getattr(self, name) not in choices:
                raise MethodParameterError(
                    f"visual_positions: {name} must be one of {', '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}."
                )
        if not isinstance(self.centred, bool):
            raise MethodParameterError(
                f"visual_positions: centred must be True or False, got {self.centred!r}."
            )

    def factors(self, axes: Sequence[str]) -> tuple[float, ...]:
        """Return the factor of each axis.

        Raises:
            MethodParameterError: If there is no axis that the rule needs.
        """
        by_axis = self.factor if isinstance(self.factor, Mapping) else {}
        placed = {"grid": (), "reset": ("h", "w"), "diagonal": AXES}[self.placement]
        behind = {"spatial": ("h", "w"), "time": ("t",)}.get(self.next_text or "", ())
        for axis in (*by_axis, *placed, *behind):
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

    def _factors(self) -> dict[str, Any]:
        if isinstance(self.factor, Mapping):
            return {f"factor of {axis!r}": value for axis, value in self.factor.items()}
        return {"factor": self.factor}


def place_visual_tokens(
    position_ids: Tensor,
    visual: Tensor,
    rule: VisualPositions,
    *,
    axes: Sequence[str] = AXES,
    next_text: str = "spatial",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the positions of a rule, made from those of a family.

    Args:
        position_ids: The family's own, ``(axes, batch, seq)``.
        visual: 0 for tokens of text, another number for each kind of visual token, ``(batch,
            seq)``; tokens of one kind next to each other are one image or video.
        rule: Where visual tokens shall stand.
        axes: Names of the rows of ``position_ids``.
        next_text: The family's own, see `VisualPositions`.
        attention_mask: 0 for padding, ``(batch, seq)``.

    Returns:
        ``(axes, batch, seq)``; float32 where a position is no whole number.

    Raises:
        RopeError: If the shapes do not agree, or ``position_ids`` do not follow ``next_text``.
    """
    if position_ids.shape != (len(axes), *visual.shape):
        raise RopeError(
            f"position_ids of the axes {', '.join(axes)} have shape (axes, batch, seq) and visual "
            f"(batch, seq); got {tuple(position_ids.shape)} and {tuple(visual.shape)}."
        )
    factors = rule.factors(axes)
    # where it is cheap to look at every block, and there is float64
    placed = position_ids.to("cpu", torch.float64)
    mask = torch.ones_like(visual) if attention_mask is None else attention_mask
    for row, (kinds_of_row, kept) in enumerate(zip(visual.cpu(), mask.cpu().bool(), strict=True)):
        own, kinds = placed[:, row, kept].clone(), kinds_of_row[kept].tolist()
        shift = 0.0
        for start, end, kind in _runs(kinds):
            first = own[:, start].clone()
            offsets = own[:, start:end] - first[:, None]
            own[:, start:end] += shift
            if not kind:
                continue
            tokens, steps = end - start, [_step(along) for along in offsets]
            before = _behind(next_text, _ends(offsets, steps, (1.0,) * len(axes)), tokens, axes)
            _require_rule(own, first, end, before, next_text)
            scaled = _scaled(offsets, steps, factors, rule, axes)
            own[:, start:end] = _placed(scaled, offsets, first + shift, rule, axes)
            behind = rule.next_text or ("time" if rule.placement == "diagonal" else next_text)
            ends = _ends(offsets, steps, factors)
            if "t" in axes:
                time = axes.index("t")
                ends[time] = rule.stride * (ends[time] - 1) + 1
            shift += _behind(behind, ends, tokens, axes) - before
        placed[:, row, kept] = own
    whole = bool((placed == placed.round()).all())
    return placed.to(position_ids.device, position_ids.dtype if whole else torch.float32)


def _runs(kinds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and kind of tokens of one kind next to each other."""
    start = 0
    for kind, run in itertools.groupby(kinds):
        end = start + len(list(run))
        yield start, end, kind
        start = end


def _step(along: Tensor) -> float:
    """Return the distance of neighbouring positions on an axis; 0 where there is one position."""
    known = sorted(set(along.tolist()))
    return known[1] - known[0] if len(known) > 1 else 0.0


def _ends(offsets: Tensor, steps: Sequence[float], factors: Sequence[float]) -> list[float]:
    """Return where each axis of a block ends: one position behind the last of its steps."""
    return [
        (float(along.max()) + step) / factor - step + 1 if step else 1.0
        for along, step, factor in zip(offsets, steps, factors, strict=True)
    ]


def _behind(next_text: str, ends: Sequence[float], tokens: int, axes: Sequence[str]) -> float:
    """Return how far behind the beginning of a block the text goes on."""
    if next_text == "tokens":
        return tokens
    names = {"max": axes, "spatial": ("h", "w"), "time": ("t",)}[next_text]
    return max(end for end, axis in zip(ends, axes, strict=True) if axis in names)


def _require_rule(own: Tensor, first: Tensor, end: int, before: float, next_text: str) -> None:
    """Check that the family placed the text behind a block as it is said to."""
    if end == own.shape[1]:
        return
    expected = torch.full_like(first, end) if next_text == "tokens" else first + before
    if not torch.equal(own[:, end], expected):
        raise RopeError(
            f"the text behind a visual block begins at {own[:, end].tolist()}, where "
            f"next_text={next_text!r} means {expected.tolist()}: these positions follow another "
            f"rule, or their visual tokens are not the ones marked. Nothing was placed."
        )


def _scaled(
    offsets: Tensor,
    steps: Sequence[float],
    factors: Sequence[float],
    rule: VisualPositions,
    axes: Sequence[str],
) -> Tensor:
    """Return the offsets within a block divided by the factors, ``(axes, tokens)``."""
    rows = []
    for along, step, factor, axis in zip(offsets, steps, factors, axes, strict=True):
        half = step / 2 if rule.centred else 0.0
        scaled = (along + half) / factor - half
        rows.append(scaled * rule.stride if axis == "t" else scaled)
    return torch.stack(rows)


def _placed(
    scaled: Tensor, offsets: Tensor, first: Tensor, rule: VisualPositions, axes: Sequence[str]
) -> Tensor:
    """Return the positions of a block's tokens, ``(axes, tokens)``."""
    placed = scaled + first[:, None]
    if rule.placement == "grid":
        return placed
    for axis in ("h", "w"):
        row = axes.index(axis)
        placed[row] = scaled[row]
        if rule.placement == "diagonal":
            time = placed[axes.index("t")]
            middle = math.floor(float(offsets[row].max()) / 2)
            share = float(rule.factors(axes)[row])
            placed[row] = time + (offsets[row] - middle) / share
    return placed


def _is_positive(value: object) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and 0 < value < math.inf  # type: ignore[operator]


LAYOUT_POSITIONS = {
    "videorope": VisualPositions(placement="diagonal", stride=2.0),
    "hope": VisualPositions(placement="diagonal"),
}
"""The placement that belongs to an M-RoPE layout."""

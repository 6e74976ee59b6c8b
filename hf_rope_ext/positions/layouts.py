"""M-RoPE layouts: which position axis rotates each pair.

The layout that a family was trained with is part of its rotary module and is used as it is. The
layouts here are for training and experiments. Switching to another layout changes the encoding of
every image and video; text is unaffected, since its position is the same on all axes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_rope_ext.checks import require_choice
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.positions.placement import AXES, VisualPositions

TIME, HEIGHT, WIDTH = range(3)


@dataclass(frozen=True)
class MRopeLayout:
    """An M-RoPE layout, by name.

    - ``"chunked"``: time rotates the fastest pairs, then height, and width the slowest
      (Qwen2-VL, arXiv:2409.12191, sec. 2.1).
    - ``"interleaved"``: time, height and width alternate until height and width have their share
      (Qwen3-VL, arXiv:2511.21631; MRoPE-I, arXiv:2510.23095).
    - ``"videorope"``: height and width alternate over the fast pairs; time rotates the slowest
      (arXiv:2502.05173, sec. 4.1).
    - ``"hope"``: as ``"videorope"``, with the time pairs unrotated (arXiv:2505.20444, sec. 4.1).
    - ``"mhrope"``: one axis rotates a whole key head and its queries (arXiv:2510.23095, sec. 4.2).

    Args:
        name: One of these.
        section: Number of pairs for time, height and width; for ``"mhrope"``, of key heads. By
            default the model's own numbers; for ``"mhrope"``, heads in the same proportions.
    """

    name: str
    section: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Check the name and the section."""
        require_choice("mrope_layout", self.name, LAYOUTS, MethodParameterError)
        section = self.section
        if section is None:
            return
        if (
            not isinstance(section, Sequence)
            or len(section) != 3
            or not all(type(size) is int and size >= 0 for size in section)
        ):
            raise MethodParameterError(
                f"{self.name}: section must be three whole numbers, for time, height and width, "
                f"got {section!r}."
            )
        object.__setattr__(self, "section", tuple(section))

    @property
    def visual_positions(self) -> VisualPositions | None:
        """The placement of visual tokens that belongs to the layout; None for the family's own."""
        return LAYOUTS[self.name].visual_positions

    def on(self, axes: Sequence[str], heads: int) -> "AppliedLayout":
        """Apply the layout to a model.

        Args:
            axes: Name of the axis that rotates each pair of the trained model.
            heads: Key heads of an attention layer.

        Raises:
            MethodParameterError: If the model has other axes, or the section does not sum to its
                number of pairs (key heads).
        """
        if set(axes) != set(AXES):
            raise MethodParameterError(
                f"mrope_layout={self.name!r} is for models whose pairs turn by t, h and w; those "
                f"of this one turn by {', '.join(dict.fromkeys(axes))}."
            )
        layout = LAYOUTS[self.name]
        total, unit = (heads, "key heads") if layout.per_head else (len(axes), "pairs")
        section: Sequence[int] | None = self.section
        if section is None:
            section = [axes.count(axis) for axis in AXES]
            section = self._divide_heads(section, heads) if layout.per_head else section
        if sum(section) != total:
            raise MethodParameterError(
                f"{self.name}: section {list(section)!r} sums to {sum(section)}, but the model has "
                f"{total} {unit}."
            )
        return AppliedLayout(layout.assign(*section), AXES, layout.per_head, layout.resting)

    def _divide_heads(self, section: Sequence[int], heads: int) -> tuple[int, ...]:
        """Divide the heads in proportion to the pairs, at least one per axis.

        Raises:
            MethodParameterError: If there are fewer heads than axes.
        """
        axes = len(section)
        if heads < axes:
            raise MethodParameterError(
                f"{self.name}: {heads} key heads cannot be shared among {axes} axes."
            )
        ends = [round(heads * sum(section[: axis + 1]) / sum(section)) for axis in range(axes)]
        for axis in range(axes):  # at least one head each, counted from the front and the back
            ends[axis] = max(ends[axis], axis + 1)
        for axis in reversed(range(axes)):
            ends[axis] = min(ends[axis], heads - (axes - 1 - axis))
        return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


@dataclass(frozen=True)
class AppliedLayout:
    """A layout applied to a model.

    Args:
        rows: Row of ``position_ids`` that rotates each pair (each key head).
        names: Name of the axis of each row.
        per_head: Whether ``rows`` refers to key heads.
        resting: Row whose pairs stay unrotated; None if every row rotates its pairs.
    """

    rows: tuple[int, ...]
    names: tuple[str, ...]
    per_head: bool = False
    resting: int | None = None

    def angles(self, position_ids: Tensor, inv_freq: Tensor, order: Sequence[int] | None) -> Tensor:
        """Compute the angle of each pair in float32.

        Args:
            position_ids: ``(batch, seq)`` if equal on all axes, else ``(axes, batch, seq)``.
            inv_freq: ``(pairs,)`` or ``(batch, 1, pairs)``; per head, with ``axes`` in front.
            order: Order in which ``inv_freq`` stores the pairs; None for the natural one.

        Returns:
            ``(batch, seq, pairs)``; per head, with ``axes`` in front.
        """
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(len(self.names), -1, -1)
        if self.per_head:
            inv_freq = inv_freq[:, None, None] if inv_freq.ndim == 2 else inv_freq
            return position_ids[..., None].float() * inv_freq
        rows = self.rows if order is None else [self.rows[pair] for pair in order]
        along = position_ids[list(rows)].movedim(0, -1)
        return along.float() * inv_freq


def chunked(time: int, height: int, width: int) -> tuple[int, ...]:
    """Assign the axes one after the other."""
    return (TIME,) * time + (HEIGHT,) * height + (WIDTH,) * width


def interleaved(time: int, height: int, width: int) -> tuple[int, ...]:
    """Assign the axes in turn; once height or width has its share, time takes its place."""
    limits = {HEIGHT: 3 * height, WIDTH: 3 * width}
    return tuple(
        axis if pair < limits.get(axis := pair % 3, 0) else TIME
        for pair in range(time + height + width)
    )


def videorope(time: int, height: int, width: int) -> tuple[int, ...]:
    """Assign height and width in turn, then time."""
    turns = itertools.zip_longest((HEIGHT,) * height, (WIDTH,) * width)
    spatial = tuple(axis for turn in turns for axis in turn if axis is not None)
    return spatial + (TIME,) * time


@dataclass(frozen=True)
class LayoutRule:
    """The definition of a layout.

    Args:
        assign: From the section to the axis of each pair (key head), fastest pair first.
        per_head: Whether axes are assigned to key heads instead of pairs.
        resting: The axis whose pairs stay unrotated; None if all rotate.
        visual_positions: The placement of visual tokens; None for the family's own.
    """

    assign: Callable[..., tuple[int, ...]]
    per_head: bool = False
    resting: int | None = None
    visual_positions: VisualPositions | None = None


LAYOUTS = {
    "chunked": LayoutRule(chunked),
    "interleaved": LayoutRule(interleaved),
    "videorope": LayoutRule(
        videorope, visual_positions=VisualPositions(placement="diagonal", stride=2.0)
    ),
    "hope": LayoutRule(
        videorope, resting=TIME, visual_positions=VisualPositions(placement="diagonal")
    ),
    "mhrope": LayoutRule(chunked, per_head=True),
}
"""Every layout by name; a new one is one entry."""

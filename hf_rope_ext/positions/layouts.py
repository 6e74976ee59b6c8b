"""Which position axis each pair turns by: M-RoPE layouts of our own.

A family's own layout is in its rotary module and is used as it is; these are for training and for
study. A layout other than the trained one changes every image and video, and no text, whose
positions are equal on all axes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_rope_ext.errors import MethodParameterError

AXES = ("t", "h", "w")
"""Time, height and width: the rows of ``position_ids`` ``(3, batch, seq)``."""

TIME, HEIGHT, WIDTH = range(3)


@dataclass(frozen=True)
class MRopeLayout:
    """A layout by name.

    - ``"chunked"``: the fastest pairs turn by time, the next by height, the slowest by width
      (Qwen2-VL, arXiv:2409.12191, sec. 2.1).
    - ``"interleaved"``: time, height and width take turns, until height and width have their share
      (Qwen3-VL, arXiv:2511.21631; MRoPE-I, arXiv:2510.23095).
    - ``"videorope"``: height and width take turns over the fast pairs, time has the slowest ones
      (arXiv:2502.05173, sec. 4.1).
    - ``"hope"``: the same, and the pairs of time do not turn at all (arXiv:2505.20444, sec. 4.1).
    - ``"mhrope"``: each key head and its queries turn by one axis (arXiv:2510.23095, sec. 4.2).

    Args:
        name: One of these.
        section: Pairs of time, height and width; for ``"mhrope"`` key heads. When not given, the
            model's own, or for ``"mhrope"`` heads in its proportions.
    """

    name: str
    section: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Check name and section."""
        if not isinstance(self.name, str) or self.name not in LAYOUTS:
            raise MethodParameterError(
                f"mrope_layout must be one of {', '.join(map(repr, LAYOUTS))}, got {self.name!r}."
            )
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
    def per_head(self) -> bool:
        """Whether heads have an axis, and not pairs."""
        return self.name == "mhrope"

    def on(self, axes: Sequence[str], heads: int) -> "AppliedLayout":
        """Return the layout on a model.

        Args:
            axes: Name of the axis that each pair was trained with.
            heads: Key heads of an attention layer.

        Raises:
            MethodParameterError: If the model's axes are others, or the section does not sum to
                the pairs (the heads) there are.
        """
        if set(axes) != set(AXES):
            raise MethodParameterError(
                f"mrope_layout={self.name!r} is for models whose pairs turn by t, h and w; those "
                f"of this one turn by {', '.join(dict.fromkeys(axes))}."
            )
        section = [axes.count(axis) for axis in AXES]
        rows = self._rows(section, heads if self.per_head else len(axes))
        return AppliedLayout(rows, AXES, self.per_head, TIME if self.name == "hope" else None)

    def _rows(self, section: Sequence[int], total: int) -> tuple[int, ...]:
        own = self.section
        if own is None:
            own = _shared(section, total) if self.per_head else tuple(section)  # type: ignore[assignment]
        assert own is not None
        if sum(own) != total:
            what = "key heads" if self.per_head else "pairs"
            raise MethodParameterError(
                f"{self.name}: section {list(own)!r} sums to {sum(own)}, but the model has {total} "
                f"{what}."
            )
        return LAYOUTS[self.name](*own)


@dataclass(frozen=True)
class AppliedLayout:
    """A layout on one model.

    Args:
        rows: Row of ``position_ids`` that each pair (each key head) turns by.
        names: Names of the axes, by row.
        per_head: Whether ``rows`` are of key heads.
        resting: The row whose pairs do not turn, None where all do.
    """

    rows: tuple[int, ...]
    names: tuple[str, ...]
    per_head: bool = False
    resting: int | None = None

    def angles(self, position_ids: Tensor, inv_freq: Tensor, order: Sequence[int] | None) -> Tensor:
        """Return the angle of each pair, float32.

        Args:
            position_ids: ``(batch, seq)``, the same on all axes, or ``(axes, batch, seq)``.
            inv_freq: ``(pairs,)`` or ``(batch, 1, pairs)``; per head with ``axes`` in front.
            order: The order of its pairs, None for the natural one.

        Returns:
            ``(batch, seq, pairs)``; per head with ``axes`` in front.
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
    """Return the axis of each pair, one axis after the other."""
    return (TIME,) * time + (HEIGHT,) * height + (WIDTH,) * width


def interleaved(time: int, height: int, width: int) -> tuple[int, ...]:
    """Return the axis of each pair, taking turns; time has what height and width leave."""
    share = {HEIGHT: 3 * height, WIDTH: 3 * width}
    return tuple(
        axis if pair < share.get(axis := pair % 3, 0) else TIME
        for pair in range(time + height + width)
    )


def videorope(time: int, height: int, width: int) -> tuple[int, ...]:
    """Return the axis of each pair: height and width taking turns, then time."""
    turns = itertools.zip_longest((HEIGHT,) * height, (WIDTH,) * width)
    spatial = tuple(axis for both in turns for axis in both if axis is not None)
    return spatial + (TIME,) * time


LAYOUTS: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "chunked": chunked,
    "interleaved": interleaved,
    "videorope": videorope,
    "hope": videorope,
    "mhrope": chunked,
}


def _shared(section: Sequence[int], heads: int) -> tuple[int, ...]:
    """Return heads in the proportions of pairs, each axis with at least one.

    Raises:
        MethodParameterError: If there are fewer heads than axes.
    """
    if heads < len(section):
        raise MethodParameterError(
            f"mhrope: {heads} key heads cannot be shared among {len(section)} axes."
        )
    ends = [round(heads * sum(section[: axis + 1]) / sum(section)) for axis in range(len(section))]
    for axis in range(len(section)):  # at least one each, from the front and from the back
        ends[axis] = max(ends[axis], axis + 1)
    for axis in reversed(range(len(section))):
        ends[axis] = min(ends[axis], heads - (len(section) - 1 - axis))
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))

"""ReRoPE and Leaky ReRoPE: distances beyond a window are cut off, or grow more slowly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
    require_within,
    targeted,
)
from hf_rope_ext.methods.method import store_number

USED = 0.75
"""Share of the trained length that Leaky ReRoPE maps a request into."""


@dataclass(frozen=True)
class ReRoPE(AttentionMethod):
    """Rectified RoPE (Su, 2023, kexue.fm/archives/9708).

    A key at distance D is seen at distance min(D, window). It serves requests of any length.

    Args:
        method: The method whose frequencies it rotates by.
        window: Distance in positions from which distances no longer grow; half of the trained
            length by default.
        factor: Target length over trained length, which sets the length limit and nothing else.
    """

    name = "rerope"
    counts = ("window",)

    window: int | None = None

    def check(self, geometry: RopeGeometry) -> None:
        """Check the window."""
        if self.window is not None:
            require_within(self, "window", self.window, geometry)

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the near band, and the far one, of queries at ``window`` and keys at 0."""
        window = near_window(self.window, asked)
        border = asked.query - (window - 1)
        far = Band(stop=border, query=0 * asked.query + window, key=0 * asked.key)
        return Band(start=border), far


@dataclass(frozen=True)
class LeakyReRoPE(AttentionMethod):
    """Leaky ReRoPE (Su, 2023, kexue.fm/archives/9708).

    A key at distance D is seen at D within the window, else at window + (D - window) / slowdown.

    Args:
        method: The method whose frequencies it rotates by.
        window: Distance in positions up to which distances stay; half of the trained length by
            default.
        slowdown: How much more slowly distances grow beyond it, at least 1, which changes nothing.
            By default the smallest that keeps the distances of the target length, or of each
            request, within 3/4 of the trained length.
        factor: Target length over trained length, instead of ``slowdown``.
    """

    name = "leaky_rerope"
    counts = ("window",)

    window: int | None = None
    slowdown: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "slowdown", optional=True, least=1.0)

    @property
    def follows_length(self) -> bool:
        """Whether the slowdown is chosen for each request."""
        return self.slowdown is None and self.factor is None

    def check(self, geometry: RopeGeometry) -> None:
        """Check the window, which must leave room for what is beyond it."""
        if self.window is None:
            return
        require_within(self, "window", self.window, geometry)
        most = math.ceil(USED * geometry.original_max_position_embeddings) - 1
        if self.slowdown is None and self.window > most:
            raise MethodParameterError(
                f"{self.name}: window must be less than 3/4 of the trained length, at most {most} "
                f"positions, where no slowdown is given, got {self.window}."
            )

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the near band, and the far one, of positions divided by the slowdown."""
        window, slow = near_window(self.window, asked), self._slowdown(asked)
        border = asked.query - (window - 1)
        far = Band(
            stop=border, query=asked.query / slow + (window - window / slow), key=asked.key / slow
        )
        return Band(start=border), far

    def _slowdown(self, asked: Distances) -> Tensor | float:
        if self.slowdown is not None:
            return self.slowdown
        window = near_window(self.window, asked)
        far = (targeted(self.factor, asked) - window) / (USED * asked.trained - window)
        # within the trained length nothing changes
        fits = targeted(self.factor, asked) <= asked.trained
        return far.clamp(min=1.0).masked_fill(fits, 1.0)


def near_window(window: int | None, asked: Distances) -> int:
    """Return a window, half of the trained length by default."""
    return max(asked.trained // 2, 1) if window is None else window

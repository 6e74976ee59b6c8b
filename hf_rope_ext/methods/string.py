"""STRING: far keys are seen at the distances that training saw most often."""

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
)

WINDOW = 128
"""The paper's local window, in positions."""


@dataclass(frozen=True)
class String(AttentionMethod):
    """STRING (An et al., 2024, arXiv:2410.18745), for models within their trained length.

    A key at distance D of at least ``shift`` is seen at D - shift + window. Long distances, which
    training saw seldom, are replaced by shorter ones.

    Args:
        method: The method whose frequencies it rotates by.
        shift: Distance in positions from which distances are moved, at most the trained length. By
            default a third of it, or what keeps the length of ``factor`` within it, if that is
            more.
        window: Distance that ``shift`` is moved to; by default the paper's 128, or half of
            ``shift`` if that is less. At most ``shift``, which changes nothing.
        factor: Target length over trained length, which chooses ``shift``.
    """

    name = "string"
    counts = ("shift", "window")

    shift: int | None = None
    window: int | None = None

    def check(self, geometry: RopeGeometry) -> None:
        """Check the shift and the window against each other and the trained length."""
        shift, window = self._sizes(geometry.original_max_position_embeddings)
        if self.shift is not None:
            require_within(self, "shift", shift, geometry)
        if window > shift:
            raise MethodParameterError(
                f"{self.name}: window must be at most the shift of {shift} positions, got {window}."
            )

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the near band, and the far one of moved queries."""
        shift, window = self._sizes(asked.trained)
        border = asked.query - (shift - 1)
        moved: Tensor = asked.query + (window - shift)
        return Band(start=border), Band(stop=border, query=moved)

    def _sizes(self, trained: int) -> tuple[int, int]:
        """Return the shift and the window."""
        shift = max(trained // 3, 1) if self.shift is None else self.shift
        window = max(min(WINDOW, shift // 2), 1) if self.window is None else self.window
        if self.shift is None and self.factor is not None:
            shift = max(shift, round(self.factor * trained) - trained + window)
        return shift, window

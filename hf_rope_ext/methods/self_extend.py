"""Self-Extend: far keys are seen at grouped positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

USED = 0.6
"""Share of the trained length that a request is mapped into; the authors advise 1/2 to 2/3."""


@dataclass(frozen=True)
class SelfExtend(AttentionMethod):
    """Self-Extend (Jin et al., 2024, arXiv:2401.01325).

    A key at distance D of at least ``window`` is seen at floor(m / group) - floor(n / group) +
    window - floor(window / group), for a query at m and a key at n.

    Args:
        method: The method whose frequencies it rotates by.
        group: Positions in a group, at least 1, which changes nothing. By default the fewest that
            keep the target length, or each request, within 0.6 of the trained length.
        window: Distance in positions up to which distances stay; a quarter of the trained length
            by default.
        factor: Target length over trained length, instead of ``group``.
    """

    name = "self_extend"
    counts = ("group", "window")

    group: int | None = None
    window: int | None = None

    @property
    def follows_length(self) -> bool:
        """Whether the group is chosen for each request."""
        return self.group is None and self.factor is None

    def check(self, geometry: RopeGeometry) -> None:
        """Check the window, which must leave room for the groups."""
        if self.window is None:
            return
        require_within(self, "window", self.window, geometry)
        most = int(USED * geometry.original_max_position_embeddings) - 1
        if self.group is None and self.window > most:
            raise MethodParameterError(
                f"{self.name}: window must be at most {most} positions, less than 0.6 of the "
                f"trained length, where no group is given, got {self.window}."
            )

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the near band, and the far one of grouped positions."""
        window = max(asked.trained // 4, 1) if self.window is None else self.window
        group = self._group(window, asked)
        border = asked.query - (window - 1)
        query = (asked.query / group).floor() + window - (window / group).floor()
        return Band(start=border), Band(stop=border, query=query, key=(asked.key / group).floor())

    def _group(self, window: int, asked: Distances) -> Tensor:
        if self.group is not None:
            return torch.full_like(asked.length, float(self.group))
        length = targeted(self.factor, asked)
        group = ((length - window) / (USED * asked.trained - window)).ceil()
        return group.clamp(min=1.0).masked_fill(length <= asked.trained, 1.0)

"""Attention sinks: the first keys and the last ones, and nothing between."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
    require_positions,
)


@dataclass(frozen=True)
class Streaming(AttentionMethod):
    """StreamingLLM (Xiao et al., 2023, arXiv:2309.17453).

    A query sees the first ``sinks`` keys and the last ``window``, its own among them, at their
    distances among the keys it sees. Text of any length keeps its fluency; what lies between is
    forgotten. A cache still holds the keys between.

    Args:
        method: The method whose frequencies it rotates by.
        sinks: Number of first positions that are always seen.
        window: Number of last positions that are seen; what the trained length leaves beside the
            sinks by default.
        factor: Target length over trained length, which sets the length limit and nothing else.
    """

    name = "streaming"
    needs_rotation = False
    counts = ("window",)

    sinks: int = 4
    window: int | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require_positions(self, "sinks", least=0)

    def check(self, geometry: RopeGeometry) -> None:
        """Check that sinks and window lie within what the frequencies are for."""
        room = self.method.target_length(geometry) or geometry.original_max_position_embeddings
        window = self.window or 1
        if self.sinks + window > room:
            raise MethodParameterError(
                f"{self.name}: sinks and window must be at most {room} positions together, for "
                f"which the frequencies are, got {self.sinks} and {window}."
            )

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the window, and the sinks outside it."""
        sinks, window = self.seen(asked.trained)
        border = asked.query - (window - 1)
        seen = torch.clamp(asked.query, max=sinks + window - 1.0)
        return Band(start=border), Band(stop=border.clamp(max=sinks), query=seen)

    def seen(self, trained: int) -> tuple[int, int]:
        """Return how many first and last positions are seen."""
        return self.sinks, max(trained - self.sinks, 1) if self.window is None else self.window

"""Dual chunk attention: no distance is larger than a chunk and its neighbour."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
    require_within,
)


@dataclass(frozen=True)
class DCA(AttentionMethod):
    """Dual chunk attention (An et al., 2024, arXiv:2402.17463).

    Positions are cut into chunks. Keys are at their place in their chunk, n mod ``chunk``; queries
    see their own chunk from m mod ``chunk``, the one before from min(m mod ``chunk`` + ``chunk``,
    ``limit`` - 1), and those further back from ``limit`` - 1. Requests within ``limit`` are
    computed as ever. It serves any length; combine it with ``temperature`` (``"dca+temperature"``).

    Args:
        method: The method whose frequencies it rotates by.
        chunk: Positions in a chunk; 3/4 of the trained length by default.
        limit: The largest distance + 1, from ``chunk`` to the trained length, its default.
        factor: Target length over trained length, which sets the length limit and nothing else.
    """

    name = "dca"
    counts = ("chunk", "limit")

    chunk: int | None = None
    limit: int | None = None

    def check(self, geometry: RopeGeometry) -> None:
        """Check the chunk and the limit against each other and the trained length."""
        chunk, limit = self._sizes(geometry.original_max_position_embeddings)
        require_within(self, "limit", limit, geometry)
        if chunk > limit:
            raise MethodParameterError(
                f"{self.name}: chunk must be at most the limit of {limit} positions, got {chunk}."
            )

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return what lies ahead, the query's own chunk, the one before, and all before that.

        Only frames of a video lie ahead, of text behind it that a model places before its end.
        """
        chunk, limit = self._sizes(asked.trained)
        start = (asked.query / chunk).floor() * chunk
        place, key = asked.query - start, asked.key % chunk
        before = torch.clamp(place + chunk, max=limit - 1.0)
        return (
            Band(start=start + chunk),
            Band(start=start, stop=start + chunk, query=place, key=key),
            Band(start=start - chunk, stop=start, query=before, key=key),
            Band(stop=start - chunk, query=0 * asked.query + (limit - 1.0), key=key),
        )

    def _sizes(self, trained: int) -> tuple[int, int]:
        """Return the chunk and the limit."""
        limit = trained if self.limit is None else self.limit
        chunk = max(min(trained * 3 // 4, limit), 1) if self.chunk is None else self.chunk
        return chunk, limit

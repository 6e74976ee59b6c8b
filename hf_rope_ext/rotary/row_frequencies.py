"""Frequencies that differ by row, for rotary code that expects one vector.

Since transformers 5.19 families compute ``position_ids[..., None] * inv_freq``, through which
frequencies of any shape broadcast. Before, they computed the same products as
``inv_freq[None, :, None].expand(batch, -1, 1) @ position_ids[:, None, :]``.
"""

from typing import Any

from torch import Tensor


class RowFrequencies:
    """Stands for ``inv_freq`` in that matrix product, whose inner dimension is 1.

    Args:
        frequencies: ``(batch, 1 or seq, pairs)``.
    """

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies

    def __getitem__(self, index: Any) -> "RowFrequencies":
        """Return itself: the dimensions that are added here are there already."""
        return self

    def expand(self, *sizes: int) -> "RowFrequencies":
        """Return itself: the product broadcasts."""
        return self

    def float(self) -> "RowFrequencies":
        """Return itself: frequencies are float32."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> "RowFrequencies":
        """Return itself on a device; its dtype stays."""
        return RowFrequencies(self.frequencies.to(*args, **kwargs))

    def __matmul__(self, positions: Tensor) -> Tensor:
        """Return the angles ``(..., batch, pairs, seq)`` of positions ``(..., batch, 1, seq)``."""
        angles = positions.transpose(-1, -2).float() * self.frequencies.to(positions.device)
        return angles.transpose(-1, -2)

"""Cosines and sines per head, for attention code that expects the same for all heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PerHead(Tensor):
    """Cosines (or sines) with an axis of key heads, ``(batch, key heads, seq, width)``.

    Families multiply ``(batch, heads, seq, head_dim)`` by cosines that they unsqueeze to broadcast
    over heads. These already have a head axis, and are multiplied by keys and by queries, of which
    several share a key head.
    """

    @classmethod
    def of(cls, by_axis: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int]) -> tuple[Any, Any]:
        """Return cosines and sines by head.

        Args:
            by_axis: Cosines and sines of each axis, ``(batch, seq, width)``, or with axes in front
                where the attention takes its own from each.
            rows: Row of ``by_axis`` that each key head uses.
        """
        cos, sin = (
            torch.stack([by_axis[row][part] for row in rows], dim=-3).as_subclass(cls)
            for part in (0, 1)
        )
        return cos, sin

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Ignore the unsqueeze, and repeat key heads in a product with queries."""
        if func in (torch.unsqueeze, Tensor.unsqueeze):
            return args[0]
        if func in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
            left, right = args
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                mine, theirs = (left, right) if isinstance(left, cls) else (right, left)
                groups = theirs.shape[1] // mine.shape[1]
                plain = mine.as_subclass(Tensor).repeat_interleave(groups, dim=1)
                return plain * theirs
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

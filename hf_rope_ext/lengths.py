"""Which length decides the plan of a length-dependent method.

A call without a cache is its own request: each row's length is its largest position + 1, whatever
its neighbours in the batch, the padding or the shape of the tensors. Nothing is remembered from
one call to the next.
"""

import torch
from torch import Tensor


def row_lengths(position_ids: Tensor) -> Tensor:
    """Return the length of each row, in positions.

    Args:
        position_ids: ``(batch, seq)``, or ``(axes, batch, seq)`` for M-RoPE, where the length is
            the largest position over all axes.

    Returns:
        Float64 (float32 where the device has no float64), shape ``(batch, 1, 1)``.
    """
    if position_ids.ndim == 3:
        position_ids = position_ids.amax(dim=0)
    longest = position_ids.amax(dim=-1) + 1
    precise = torch.float32 if longest.device.type == "mps" else torch.float64
    return longest.to(precise).reshape(-1, 1, 1)

"""Relative biases: a number for each distance, added to the attention score before the softmax."""

import math

import torch
from torch import Tensor

from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import RopeError


def t5_buckets(
    offsets: Tensor, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Return the bucket of each offset (T5: Raffel et al., 2020, arXiv:1910.10683, sec. 2.1).

    Half of the buckets hold one distance each, the others grow logarithmically up to
    ``max_distance``, beyond which everything shares the last one.

    Args:
        offsets: Position of the key minus that of the query, integers of any shape.
        bidirectional: Whether keys ahead have buckets of their own (the second half). If not, they
            are in bucket 0 with distance 0, and a causal mask must hide them.
        buckets: Number of buckets, a multiple of 4, or of 2 if not bidirectional.
        max_distance: In positions, more than the number of buckets with one distance.

    Returns:
        Integers from 0 to ``buckets - 1``, in the shape of ``offsets``.

    Raises:
        RopeError: If the buckets cannot be halved, or ``max_distance`` is too small.
    """
    require_integer("buckets", buckets, 2)
    per_side = buckets // 2 if bidirectional else buckets
    single = per_side // 2
    if buckets % (4 if bidirectional else 2):
        unit = "4 if bidirectional" if bidirectional else "2"
        raise RopeError(f"buckets must be a multiple of {unit}, got {buckets!r}.")
    require_integer("max_distance", max_distance, single + 1, unit="positions")
    distances = offsets.abs() if bidirectional else (-offsets).clamp(min=0)
    # float32, as T5 was trained: at a bucket's edge another width can round to its neighbour
    ratio = torch.log(distances.clamp(min=1).float() / single) / math.log(max_distance / single)
    grown = single + (ratio * (per_side - single)).long()
    found = torch.where(distances < single, distances, grown.clamp(max=per_side - 1))
    return found + (offsets > 0) * per_side if bidirectional else found


def t5_bias(
    table: Tensor,
    queries: Tensor,
    keys: Tensor,
    bidirectional: bool,
    max_distance: int = 128,
) -> Tensor:
    """Return T5's bias, a learned number for each bucket and head (see `t5_buckets`).

    T5 shares one table among all layers and does not divide scores by ``sqrt(head_dim)``.

    Args:
        table: ``(buckets, heads)``, a parameter to train.
        queries: Integer positions, ``(queries,)``.
        keys: Integer positions, ``(keys,)``.
        bidirectional: See `t5_buckets`, as for ``max_distance``.
        max_distance: In positions.

    Returns:
        ``(heads, queries, keys)``.
    """
    offsets = keys[None, :] - queries[:, None]
    return table[t5_buckets(offsets, bidirectional, len(table), max_distance)].movedim(-1, 0)


def alibi_bias(slopes: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return ALiBi's bias, minus slope times distance.

    Keys ahead are as far as keys behind; a causal mask hides them.

    Args:
        slopes: `alibi_slopes`, ``(heads,)``.
        queries: Positions, ``(queries,)``.
        keys: Positions, ``(keys,)``.

    Returns:
        ``(heads, queries, keys)``, in the dtype of the slopes.
    """
    distances = (queries[:, None] - keys[None, :]).abs().to(slopes.dtype)
    return -slopes[:, None, None] * distances

"""Linear attention, and RoPE in it.

Softmax attention weighs values by ``exp(q . k)``. Linear attention replaces the exponential by a
product of features, ``f(q) . f(k)``, whose sums over keys are computed once for all queries.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import elu, pad

from hf_rope_ext.checks import require_integer
from hf_rope_ext.encodings.rotary import rotate_pairs


def elu_features(x: Tensor) -> Tensor:
    """Return ``elu(x) + 1`` (Katharopoulos et al., 2020, arXiv:2006.16236, eq. 7)."""
    return elu(x) + 1


def performer_projection(features: int, dim: int, generator: Generator | None = None) -> Tensor:
    """Draw the random directions of `performer_features` (arXiv:2009.14794, sec. 2.4).

    Rows are orthogonal in groups of ``dim`` and as long as rows of normal numbers, which leaves the
    estimate unbiased and reduces its variance.

    Args:
        features: Number of directions.
        dim: Width of a head.
        generator: Draws them.

    Returns:
        ``(features, dim)``, float32.
    """
    require_integer("features", features, 1)
    require_integer("dim", dim, 1, unit="dimensions")
    groups = math.ceil(features / dim)
    normal = torch.randn(groups, dim, dim, generator=generator)
    q, r = torch.linalg.qr(normal)
    # without the signs of the diagonal the directions are not uniform
    directions = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(features, dim, generator=generator).norm(dim=-1, keepdim=True)
    directed: Tensor = directions.mT.reshape(-1, dim)[:features] * lengths
    return directed


def performer_features(x: Tensor, projection: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """Return positive random features of the softmax kernel (arXiv:2009.14794, sec. 2.3, eq. 5).

    ``performer_features(q) @ performer_features(k).mT`` estimates ``exp(q . k)`` without bias; for
    scaled scores divide q and k by ``head_dim ** 0.25`` first.

    Args:
        x: Queries or keys, ``(..., seq, head_dim)``.
        projection: `performer_projection`, ``(features, head_dim)``.
        shift: Subtracted from the exponents, to keep them in range. It cancels in attention if it
            is the same for all keys of a head; that of queries may differ from query to query.

    Returns:
        Positive numbers, ``(..., seq, features)``.
    """
    exponents = x @ projection.to(x).mT - x.square().sum(dim=-1, keepdim=True) / 2
    features: Tensor = (exponents - shift).exp() / math.sqrt(len(projection))
    return features


def linear_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    causal: bool,
    angles: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """Return linear attention, with RoPE if there are angles (arXiv:2104.09864, sec. 3.3, eq. 19).

    Features are rotated in the numerator and not in the denominator, which must not become 0::

        sum_n (R_m f(q_m)) . (R_n f(k_n)) v_n / sum_n f(q_m) . f(k_n)

    Rotated products may be negative, so a result is not a mean of values.

    Args:
        queries: Features of the queries, at least 0 and not all 0, ``(..., seq, features)``.
        keys: Features of the keys, the same shape.
        values: ``(..., seq, width)``.
        causal: Whether a query sees only keys up to its own position.
        angles: `hf_rope_ext.encodings.rope_angles` of as many pairs as half of the features,
            ``(seq, pairs)`` or broadcastable; None for no RoPE.
        chunk: Positions that causal attention takes at once. Time is ``seq * chunk * width`` plus
            ``seq * features * width``.

    Returns:
        ``(..., seq, width)``.

    Raises:
        RopeError: If ``chunk`` or the number of angles is wrong.
    """
    require_integer("chunk", chunk, 1, unit="positions")
    turned = (queries, keys)
    if angles is not None:
        turned = (rotate_pairs(queries, angles), rotate_pairs(keys, angles))
    ones = values.new_ones(*keys.shape[:-1], 1)
    if not causal:
        numerator = turned[0] @ (turned[1].mT @ values)
        return numerator / (queries @ keys.sum(dim=-2)[..., None])
    return _causal(*turned, values, chunk) / _causal(queries, keys, ones, chunk)


def _causal(queries: Tensor, keys: Tensor, values: Tensor, chunk: int) -> Tensor:
    """Return ``sum_n<=m (q_m . k_n) v_n``: quadratic within a chunk, a running sum before it."""
    seq = queries.shape[-2]
    rest = -seq % chunk

    def split(x: Tensor) -> Tensor:
        padded = pad(x, (0, 0, 0, rest))
        return padded.reshape(*x.shape[:-2], -1, chunk, x.shape[-1])

    q, k, v = split(queries), split(keys), split(values)
    within = (q @ k.mT).tril() @ v
    sums = (k.mT @ v).cumsum(dim=-3)
    before = pad(sums[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    return (within + q @ before).flatten(-3, -2)[..., :seq, :]

"""RoPE in its codings, as a matrix, and with xPos's decay.

A pair of coordinates ``(a, b)`` at angle t becomes ``(a cos t - b sin t, a sin t + b cos t)``.
Which coordinates are a pair is a matter of order: neighbours in "pairs" order, ``i`` and ``i +
pairs`` in "halves" order. Weights trained in one order must be reordered for the other.
"""

import torch
from torch import Tensor

from hf_rope_ext.checks import require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.xpos import zeta


def rope_angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Return the angle of each pair (RoFormer: Su et al., 2021, arXiv:2104.09864, sec. 3.2).

    Args:
        positions: Integers or floats, ``(..., seq)``.
        inv_freq: Radians per position, ``(pairs,)``: `RopeGeometry.inv_freq`, or a method's plan.

    Returns:
        Radians, ``(..., seq, pairs)``, in the dtype of ``inv_freq``; float32 is off by about a
        thousandth of a radian at position 10,000.
    """
    return positions.to(inv_freq.dtype)[..., None] * inv_freq


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbours ``(2i, 2i + 1)`` (RoFormer, eq. 15 and 34; GPT-J, Llama 4).

    Args:
        x: Queries or keys, ``(..., seq, 2 * pairs)``.
        angles: `rope_angles`, ``(seq, pairs)`` or broadcastable to ``(..., seq, pairs)``.

    Returns:
        The shape and dtype of ``x``, computed in float32 or wider.

    Raises:
        RopeError: If there is not one angle for every two dimensions.
    """
    wide, cos, sin = _prepare(x, angles)
    first, second = wide[..., ::2], wide[..., 1::2]
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_complex(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbours as complex numbers: ``(a + ib) * exp(i t)`` (RoFormer, eq. 12; Llama 1).

    Arguments, result and errors are those of `rotate_pairs`.
    """
    wide, cos, sin = _prepare(x, angles)
    numbers = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(numbers * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate ``(i, i + pairs)``, the "rotate_half" of GPT-NeoX and most models in transformers.

    Arguments, result and errors are those of `rotate_pairs`.
    """
    wide, cos, sin = _prepare(x, angles)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


def rotation_matrix(angles: Tensor) -> Tensor:
    """Return the block-diagonal rotation of each position (RoFormer, eq. 15), in pairs order.

    ``R_m.T @ R_n`` is ``R_(n - m)``, hence a score depends on ``n - m`` alone.

    Args:
        angles: ``(..., pairs)``.

    Returns:
        ``(..., 2 * pairs, 2 * pairs)``, in the dtype of the angles.
    """
    size = 2 * angles.shape[-1]
    first = torch.arange(0, size, 2, device=angles.device)
    matrix = angles.new_zeros(*angles.shape[:-1], size, size)
    matrix[..., first, first] = matrix[..., first + 1, first + 1] = angles.cos()
    matrix[..., first + 1, first] = angles.sin()
    matrix[..., first, first + 1] = -angles.sin()
    return matrix


def pairs_to_halves(x: Tensor, dim: int = -1) -> Tensor:
    """Reorder from ``(a0, b0, a1, b1, ...)`` to ``(a0, a1, ..., b0, b1, ...)``.

    Scores stay as they are if queries and keys are both reordered. For the weight of a projection,
    ``(heads * head_dim, hidden)``, reorder the rows of every head:
    ``pairs_to_halves(weight.unflatten(0, (heads, -1)), dim=1).flatten(0, 1)``.

    Args:
        x: Any tensor whose ``dim`` is an even number of head dimensions.
        dim: The dimension to reorder.

    Returns:
        A tensor like ``x``.

    Raises:
        RopeError: If the dimension is odd.
    """
    return _reorder(x, dim, (-1, 2))


def halves_to_pairs(x: Tensor, dim: int = -1) -> Tensor:
    """Reorder from halves to pairs; undoes `pairs_to_halves`, whose arguments it takes."""
    return _reorder(x, dim, (2, -1))


def xpos_scales(
    positions: Tensor, dim: int, scale_base: float = 512.0, gamma: float = 0.4
) -> Tensor:
    """Return what xPos multiplies queries by, and divides keys by, after RoPE.

    ``zeta_i ** (position / scale_base)`` for pair i of ``dim / 2``, with ``zeta_i = (2 * i / dim +
    gamma) / (1 + gamma)`` (Sun et al., 2022, arXiv:2212.10554, algorithm 1). A score
    of distance n then has ``zeta_i ** (n / scale_base)`` on its i-th pair: fast pairs fade out with
    distance. Keys ahead of the query would be enlarged, so attention must be causal.

    Args:
        positions: ``(..., seq)``; those of queries and keys count from the same place. The middle
            of the sequence is a good one: at B = 512, float32 holds about 35,000 positions on
            either side.
        dim: Rotated dimensions of a head, even.
        scale_base: B, in positions.
        gamma: Of zeta.

    Returns:
        ``(..., seq, pairs)``, float64. Both coordinates of a pair are multiplied by its scale.

    Raises:
        RopeError: If an argument is out of range.
    """
    require_integer("dim", dim, 2, unit="dimensions")
    if dim % 2:
        raise RopeError(f"dim must be even, got {dim!r}.")
    require_number("scale_base", scale_base, above=0.0)
    require_number("gamma", gamma, above=0.0)
    geometry = RopeGeometry(dim, 2.0, 1, device=positions.device)
    return zeta(geometry, gamma) ** (positions.double()[..., None] / scale_base)


def _prepare(x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x in float32 or wider, and cos and sin in the same dtype."""
    if x.shape[-1] != 2 * angles.shape[-1]:
        raise RopeError(
            f"{angles.shape[-1]} angles rotate {2 * angles.shape[-1]} dimensions, got "
            f"{x.shape[-1]}; split off those that are not rotated."
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide, angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)


def _reorder(x: Tensor, dim: int, shape: tuple[int, int]) -> Tensor:
    if x.shape[dim] % 2:
        raise RopeError(f"dimension {dim} must be even, got a tensor of {tuple(x.shape)}.")
    moved = x.movedim(dim, -1)
    return moved.reshape(*moved.shape[:-1], *shape).mT.flatten(-2).movedim(-1, dim)

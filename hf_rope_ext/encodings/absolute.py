"""Absolute encodings: a vector for each position, added to the token's embedding."""

import torch
from torch import Generator, Tensor

from hf_rope_ext.checks import require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import RopeGeometry


def sinusoidal(
    positions: Tensor, dim: int, base: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the sinusoidal encoding (Vaswani et al., 2017, arXiv:1706.03762, sec. 3.5).

    Dimension ``2i`` is ``sin(p / base ** (2i / dim))`` and ``2i + 1`` the cosine of the same angle.

    Args:
        positions: Integers or floats of any shape ``(...)``.
        dim: Width of an embedding, even.
        base: The slowest wavelength is nearly ``2 * pi * base`` positions.
        dtype: Of the result; angles are float64.

    Returns:
        ``(..., dim)``.

    Raises:
        RopeError: If ``dim`` is odd, or ``base`` not above 1.
    """
    require_integer("dim", dim, 2, unit="dimensions")
    require_number("base", base, above=1.0)
    if dim % 2:
        raise RopeError(f"dim must be even, got {dim!r}.")
    inv_freq = RopeGeometry(dim, base, 1, device=positions.device).inv_freq()
    angles = positions.double()[..., None] * inv_freq
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


def learned_table(
    length: int, dim: int, std: float = 0.02, generator: Generator | None = None
) -> Tensor:
    """Return the initial table of a learned encoding (Gehring et al., 2017, arXiv:1705.03122).

    It is a parameter to train. GPT-2 and BERT start from this normal distribution.

    Args:
        length: Number of positions; there is no encoding beyond.
        dim: Width of an embedding.
        std: Standard deviation of the entries.
        generator: Draws them.

    Returns:
        ``(length, dim)``, float32.
    """
    require_integer("length", length, 1, unit="positions")
    require_integer("dim", dim, 1, unit="dimensions")
    return torch.randn(length, dim, generator=generator) * std


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Return the rows of a learned table.

    Args:
        table: ``(length, dim)``.
        positions: Integers of any shape ``(...)``.

    Returns:
        ``(..., dim)``.

    Raises:
        RopeError: If a position is not in the table.
    """
    if positions.numel() and (positions.amin() < 0 or positions.amax() >= len(table)):
        raise RopeError(
            f"the table has positions 0 to {len(table) - 1}, got {int(positions.amin())} to "
            f"{int(positions.amax())}; a learned encoding has nothing for others."
        )
    return table[positions]

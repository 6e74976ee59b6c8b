"""The trained rotary embedding of a model, and the frequencies a method derives from it.

Notation: pair ``i`` (of ``rotary_dim // 2``) rotates by ``inv_freq[i]`` radians per position,
``inv_freq[i] = base ** (-2 * i / rotary_dim)``; pairs with a small ``i`` are the fast ones.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Scale = float | Tensor
"""A scale factor: one number, or one per row of the batch, shape ``(batch, 1, 1)``."""


@dataclass(frozen=True)
class RopeGeometry:
    """The rotary embedding a model was trained with, before any scaling.

    Args:
        rotary_dim: Rotated dimensions of a head; two make a pair.
        base: The base of the frequencies, ``rope_theta`` in a config.
        original_max_position_embeddings: Trained length in positions.
        head_dim: All dimensions of a query or key head; ``rotary_dim`` by default.
        rotated_pairs: Number of pairs with a nonzero frequency, fastest first (p-RoPE,
            arXiv:2410.06205); all by default.
        device: Device of the tensors, by default the CPU.
        axes: Name of the position axis that rotates each pair (M-RoPE); None where positions have a
            single axis.
    """

    rotary_dim: int
    base: float
    original_max_position_embeddings: int
    head_dim: int | None = None
    rotated_pairs: int | None = None
    device: torch.device | None = None
    axes: tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def pairs(self) -> int:
        """Number of pairs; an odd width is rounded up."""
        return (self.rotary_dim + 1) // 2

    def index(self) -> Tensor:
        """Return the pair indices 0, 1, 2..., float64, shape ``(pairs,)``."""
        return torch.arange(self.pairs, dtype=torch.float64, device=self.device)

    def exponents(self) -> Tensor:
        """Return ``2 * i / rotary_dim`` per pair, float64, shape ``(pairs,)``."""
        return 2 * self.index() / self.rotary_dim

    def inv_freq(self) -> Tensor:
        """Return the trained frequencies in radians per position, float64, shape ``(pairs,)``."""
        frequencies = self.base ** -self.exponents()
        if self.rotated_pairs is not None:
            frequencies[self.rotated_pairs :] = 0.0
        return frequencies

    def rotations(self) -> Tensor:
        """Return the rotations of each pair over the trained length, float64, ``(pairs,)``."""
        return self.inv_freq() * self.original_max_position_embeddings / (2 * math.pi)


@dataclass(frozen=True, eq=False)
class FrequencyPlan:
    """The frequencies and temperature that a method prescribes.

    Args:
        inv_freq: Radians per position, float64, shape ``(pairs,)``, or ``(batch, 1, pairs)`` if
            they differ between rows.
        attention_scaling: Multiplier of cos and sin, whose square multiplies the attention logits;
            a number or ``(batch, 1, 1)``.
        softmax_scaling: Multiplier of the attention's softmax scale, in families whose stock
            attention reads ``mscale_all_dim`` (multi-head latent attention).
    """

    inv_freq: Tensor
    attention_scaling: Scale = 1.0
    softmax_scaling: float = 1.0

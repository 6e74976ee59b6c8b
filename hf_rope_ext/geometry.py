"""What a model was trained with, and what a method makes of it.

Notation used by every method: pair ``i`` (of ``rotary_dim // 2``) turns by ``inv_freq[i]`` radians
per position, ``inv_freq[i] = base ** (-2 * i / rotary_dim)``; a small ``i`` is a fast pair.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Scale = float | Tensor
"""A stretch: one number, or one per row of the batch, shape ``(batch, 1, 1)``."""


@dataclass(frozen=True)
class RopeGeometry:
    """The rotary embedding a model was trained with, before any scaling.

    Args:
        rotary_dim: Rotated coordinates of a head; two make a pair.
        base: The base of the frequencies, ``rope_theta`` in a config.
        original_max_position_embeddings: Trained length, in positions.
        head_dim: All coordinates of a query or key head; ``rotary_dim`` when not given.
        rotated_pairs: Pairs that turn at all; the others have frequency 0 (p-RoPE,
            arXiv:2410.06205). All pairs when not given.
        device: Where its tensors live, the CPU when not given.
        axes: Name of the position axis that each pair turns by (M-RoPE); None where positions have
            one axis.
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
        """Return the pairs' indices 0, 1, 2..., float64, shape ``(pairs,)``."""
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
        """Return the turns each pair made within the trained length, float64, ``(pairs,)``."""
        return self.inv_freq() * self.original_max_position_embeddings / (2 * math.pi)

    def wavelengths(self) -> Tensor:
        """Return positions per full turn, float64, ``(pairs,)``; infinite for a resting pair."""
        return 2 * math.pi / self.inv_freq()


@dataclass(frozen=True, eq=False)
class FrequencyPlan:
    """What the rotary embedding shall compute with.

    Args:
        inv_freq: Radians per position, float64, shape ``(pairs,)``, or ``(batch, 1, pairs)`` where
            every row has its own.
        attention_scaling: Multiplies cos and sin, so attention logits by its square; a number, or
            ``(batch, 1, 1)``.
        softmax_scaling: Multiplies the attention's own softmax scale, in the families whose stock
            attention reads ``mscale_all_dim`` (multi-head latent attention).
    """

    inv_freq: Tensor
    attention_scaling: Scale = 1.0
    softmax_scaling: float = 1.0

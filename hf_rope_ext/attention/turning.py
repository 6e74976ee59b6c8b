"""Rotate queries and keys that are rotated already, by the difference to other positions."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.rotary.pairs import PairRotation


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation by token, and maybe a gain by pair.

    Args:
        cos: Float32, ``(batch or 1, 1, tokens, head_dim)``; 1 where a coordinate does not rotate.
        sin: The same; 0 there.
        quarter: Matrix of a quarter turn, ``(head_dim, head_dim)``, applied from the right.
    """

    cos: Tensor
    sin: Tensor
    quarter: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Return states ``(batch, heads, tokens, head_dim)``, rotated in float32."""
        numbers = states.float()
        return (numbers * self.cos + numbers @ self.quarter * self.sin).to(states.dtype)

    def part(self, tokens: slice) -> "Turn":
        """Return the rotation of some of the tokens."""
        return Turn(self.cos[:, :, tokens], self.sin[:, :, tokens], self.quarter)


@dataclass(eq=False)
class Turner:
    """Makes turns of one kind of tensor, the queries or the keys of an attention module.

    Args:
        rotation: How its coordinates rotate.
    """

    rotation: PairRotation
    quarter: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Write the quarter turn as a matrix."""
        own = self.rotation
        width = len(own.turns)
        matrix = torch.zeros(width, width)
        # what is measured is 1 but for rounding, unless a norm after the rotation has weights
        is_unit = (own.gain.abs() - 1).abs() < 1e-3
        gain = torch.where(is_unit, own.gain.sign(), own.gain)
        matrix[own.partner, torch.arange(width)] = torch.where(own.turns, gain, 0.0).float()
        self.quarter = matrix

    def turn(
        self, steps: Tensor | None, inv_freq: Tensor, gain: Tensor | None, decay: Tensor | None
    ) -> Turn | None:
        """Return the turn by a number of positions.

        Args:
            steps: By how many positions each token turns, float64, ``(batch or 1, tokens)``.
            inv_freq: ``(pairs,)`` or ``(batch or 1, 1, pairs)``.
            gain: Exponents of ``decay``, ``(batch or 1, tokens)``.
            decay: Base of each pair's gain, ``(pairs,)``.

        Returns:
            None where there is nothing to do.
        """
        if steps is None and gain is None:
            return None
        device = inv_freq.device
        pair, turns = self.rotation.pair.to(device), self.rotation.turns.to(device)
        frequencies = inv_freq.double().reshape(-1, 1, inv_freq.shape[-1])
        if steps is None:
            angles = torch.zeros_like(frequencies)
        else:
            # reduced in float64: float32 does not hold a large angle
            angles = torch.remainder(steps[..., None].to(device) * frequencies, 2 * math.pi)
        cos, sin = angles.float().cos(), angles.float().sin()
        if gain is not None and decay is not None:
            factors = (decay.to(device).log() * gain[..., None].to(device)).exp().float()
            cos, sin = cos * factors, sin * factors
        cos = torch.where(turns, cos[..., pair], 1.0)[:, None]
        sin = torch.where(turns, sin[..., pair], 0.0)[:, None]
        return Turn(cos, sin, self.quarter.to(device))

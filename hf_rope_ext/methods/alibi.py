"""ALiBi: a bias by distance instead of a rotation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rope_ext.checks import require_integer
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
)


@dataclass(frozen=True)
class Alibi(AttentionMethod):
    """ALiBi (Press et al., 2021, arXiv:2108.12409): scores minus slope times distance.

    Nothing rotates. A RoPE model does not work so until it is trained to; this is for training and
    for holding encodings side by side.

    Args:
        method: What it is combined with; no method that rotates.
        factor: Target length over trained length, which sets the length limit and nothing else.
    """

    name = "alibi"
    needs_rotation = False
    stops_rotation = True

    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return frequencies of 0."""
        return torch.zeros_like(inv_freq)

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return one band of everything."""
        return (Band(),)

    def slopes(self, heads: int) -> Tensor:
        """Return the slope of each head, float64, ``(heads,)``."""
        return alibi_slopes(heads)


def alibi_slopes(heads: int) -> Tensor:
    """Return the slope of each head (ALiBi: Press et al., 2022, arXiv:2108.12409, sec. 3).

    For a power of two they are ``2 ** (-8 * h / heads)``, h = 1, 2... Otherwise, as in the authors'
    code, those of the next smaller power of two and then every second one of twice as many heads.

    Args:
        heads: Number of attention heads.

    Returns:
        In units of score per position, float64, ``(heads,)``.

    Raises:
        RopeError: If there is no head.
    """
    require_integer("heads", heads, 1)
    power = 1 << (heads.bit_length() - 1)
    exponents = torch.arange(1, power + 1, dtype=torch.float64) * (8 / power)
    between = (2 * torch.arange(heads - power, dtype=torch.float64) + 1) * (4 / power)
    return torch.exp2(-torch.cat((exponents, between)))

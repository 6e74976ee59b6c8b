"""ALiBi: a bias by distance instead of a rotation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
    store_optional_factor,
)
from hf_rope_ext.methods.method import Method
from hf_rope_ext.methods.none import NoScaling


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

    method: Method = field(default_factory=NoScaling)
    factor: float | None = None

    def __post_init__(self) -> None:
        """Check the factor."""
        store_optional_factor(self)

    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return frequencies of 0."""
        return torch.zeros_like(inv_freq)

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return one band of everything."""
        return (Band(),)

    def slopes(self, heads: int) -> Tensor:
        """Return the paper's slopes, float64, ``(heads,)``.

        They are 2 ** (-8 h / heads). For another number than a power of two, those of the next
        smaller one come first, then every second one of the next larger.
        """
        power = 2 ** (heads.bit_length() - 1)
        steps = torch.arange(1, power + 1, dtype=torch.float64)
        between = torch.arange(1, 2 * power, 2, dtype=torch.float64)
        exponents = torch.cat((-8 * steps / power, -4 * between / power))
        return 2.0 ** exponents[:heads]

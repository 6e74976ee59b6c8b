"""xPos: pairs of queries and keys decay with their distance."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
)
from hf_rope_ext.methods.method import store_number

SMOOTHING = 0.4
"""The paper's gamma."""


@dataclass(frozen=True)
class XPos(AttentionMethod):
    """xPos (Sun et al., 2022, arXiv:2212.10554), for training.

    The part of pair i in a score is multiplied by zeta ** ((m - n) / base_length), with zeta =
    (2 i / d + 0.4) / 1.4, for a query at m, a key at n and d rotated dimensions.

    Args:
        method: The method whose frequencies it rotates by.
        base_length: Distance in positions at which a pair has decayed to its zeta.
        factor: Target length over trained length, which sets the length limit and nothing else.
    """

    name = "xpos"

    base_length: float = 512

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "base_length", above=0)

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return one band of everything, with gains."""
        # around the middle of the queries, so that neither gain leaves the range of float32
        middle = (asked.query.amin(-1, keepdim=True) + asked.query.amax(-1, keepdim=True)) / 2
        query, key = ((one - middle) / self.base_length for one in (asked.query, asked.key))
        return (Band(query_gain=query, key_gain=-key),)

    def decay(self, geometry: RopeGeometry) -> Tensor:
        """Return each pair's zeta, float64, ``(pairs,)``."""
        return zeta(geometry)


def zeta(geometry: RopeGeometry, gamma: float = SMOOTHING) -> Tensor:
    """Return the paper's zeta of each pair, float64, ``(pairs,)``."""
    return (geometry.exponents() + gamma) / (1 + gamma)

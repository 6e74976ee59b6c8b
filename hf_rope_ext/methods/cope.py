"""CoPE: fade the slowest pairs out."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.method import Method, Modifier
from hf_rope_ext.methods.none import NoScaling


@dataclass(frozen=True)
class Cope(Modifier):
    """Clipped RoPE (arXiv:2602.05258): a cosine taper over the slowest pairs.

    Alone it edits the trained frequencies; ``"base+cope"`` or ``"yarn+cope"`` edits a method's.

    Args:
        method: The method whose plan is edited.
        clipped_pairs: How many pairs, from the slowest, are faded, at least 2 (1 with
            ``hard_clip``); the paper's 20 of 64, in proportion, when not given.
        hard_clip: Whether they rest altogether instead.
    """

    name = "cope"

    method: Method = field(default_factory=NoScaling)
    clipped_pairs: int | None = None
    hard_clip: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        least = 1 if self.hard_clip else 2
        value = self.clipped_pairs
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise MethodParameterError(
                f"{self.name}: clipped_pairs must be an integer of at least {least}, got {value!r}."
            )

    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return the frequencies with the slowest faded."""
        count = self.clipped_pairs
        if count is None:
            count = max(round(geometry.pairs * 20 / 64), 2)
        if count > geometry.pairs:
            raise MethodParameterError(
                f"{self.name}: clipped_pairs must be at most the model's {geometry.pairs} pairs, "
                f"got {count}."
            )
        step = geometry.index() - (geometry.pairs - count)
        if self.hard_clip:
            return inv_freq * (step < 0)
        return inv_freq * (1 + torch.cos(math.pi * step.clamp(min=0.0) / (count - 1))) / 2

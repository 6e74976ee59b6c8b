"""CoPE: fade out the slowest pairs."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.checks import require_bool, require_integer
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.method import Method, Modifier
from hf_rope_ext.methods.none import NoScaling


@dataclass(frozen=True)
class Cope(Modifier):
    """Clipped RoPE (arXiv:2602.05258): a cosine taper over the slowest pairs.

    On its own it modifies the trained frequencies; in ``"base+cope"`` or ``"yarn+cope"``, those of
    another method.

    Args:
        method: The method whose frequencies are modified.
        clipped_pairs: Number of pairs to fade, counted from the slowest; at least 2, or 1 with
            ``hard_clip``. By default the paper's share, 20 of 64.
        hard_clip: Whether to set their frequencies to 0 instead of fading them.
    """

    name = "cope"

    method: Method = field(default_factory=NoScaling)
    clipped_pairs: int | None = None
    hard_clip: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        require_bool(f"{self.name}: hard_clip", self.hard_clip, MethodParameterError)
        least = 1 if self.hard_clip else 2
        if self.clipped_pairs is not None:
            name = f"{self.name}: clipped_pairs"
            require_integer(name, self.clipped_pairs, least, error=MethodParameterError)

    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return the frequencies with the slowest pairs faded out."""
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

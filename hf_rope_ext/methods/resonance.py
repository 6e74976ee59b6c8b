"""Resonance: integer wavelengths, so that angles seen in training recur exactly."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.method import Method, Modifier
from hf_rope_ext.methods.none import NoScaling


@dataclass(frozen=True)
class Resonance(Modifier):
    """Resonance RoPE (Wang et al., 2024, arXiv:2403.00071).

    Wavelengths up to the trained length, after ``method``, are rounded to whole positions; longer
    ones are unchanged.

    Args:
        method: The method whose wavelengths are rounded.
    """

    name = "resonance"

    method: Method = field(default_factory=NoScaling)

    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return the frequencies of the rounded wavelengths."""
        wavelengths = 2 * math.pi / inv_freq
        rounded = 2 * math.pi / torch.round(wavelengths)
        return torch.where(
            wavelengths <= geometry.original_max_position_embeddings, rounded, inv_freq
        )

"""No positional encoding."""

from dataclasses import dataclass

import torch

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method


@dataclass(frozen=True)
class NoPE(Method):
    """Rotate nothing (NoPE; DroPE, arXiv:2512.12167).

    DroPE drops the rotation of a trained model and recalibrates it by a short training at the
    trained length, after which it reads further. Without that training a RoPE model does not work
    so.
    """

    name = "nope"
    needs_rotation = False
    stops_rotation = True

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return frequencies of 0."""
        return FrequencyPlan(torch.zeros_like(geometry.inv_freq()))

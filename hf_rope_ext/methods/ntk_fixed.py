"""NTK-RoPE-fixed: NTK-aware scaling that also slows the first pair."""

from dataclasses import dataclass

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling


@dataclass(frozen=True)
class NTKFixed(Scaling):
    """NTK-RoPE-fixed (Su, 2023, kexue.fm/archives/9706).

    ::

        inv_freq'[i] = inv_freq[i] * factor ** (-2 * (i + 1) / rotary_dim)

    Args:
        factor: Target length over trained length, at least 1.
    """

    name = "ntk_fixed"

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the scaled frequencies."""
        exponents = geometry.exponents() + 2 / geometry.rotary_dim
        return FrequencyPlan(geometry.inv_freq() * scale**-exponents)

"""p-RoPE: only the fastest share of the pairs turns."""

from dataclasses import dataclass
from typing import Any

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Stretched, require_real


@dataclass(frozen=True)
class Proportional(Stretched):
    """p-RoPE (Barbero et al., 2024, arXiv:2410.06205), as transformers' ``proportional``.

    Args:
        partial_rotary_factor: Share of the pairs that keep turning, the fastest ones, above 0 and
            at most 1; they keep the spacing they have, the others rest.
        factor: Turning pairs are also slowed by this, at least 1.
    """

    name = "proportional"

    factor: float = 1.0
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require_real(self, "partial_rotary_factor", above=0.0)
        if self.partial_rotary_factor > 1.0:
            raise MethodParameterError(
                f"{self.name}: partial_rotary_factor must be at most 1, got "
                f"{self.partial_rotary_factor!r}."
            )

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the slowed frequencies of the turning pairs, 0 for the others."""
        frequencies = geometry.inv_freq()
        frequencies[int(self.partial_rotary_factor * geometry.rotary_dim // 2) :] = 0.0
        return FrequencyPlan(frequencies / scale)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return transformers' ``proportional`` type; None where it would not load clean.

        It takes the whole head to rotate, and its validation does not know ``factor``.
        """
        if geometry.head_dim not in (None, geometry.rotary_dim) or self.factor != 1.0:
            return None
        return {
            "rope_type": "proportional",
            "partial_rotary_factor": self.partial_rotary_factor,
        }

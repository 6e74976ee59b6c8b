"""p-RoPE: rotate only the fastest pairs."""

from dataclasses import dataclass
from typing import Any

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling, store_number


@dataclass(frozen=True)
class Proportional(Scaling):
    """p-RoPE (Barbero et al., 2024, arXiv:2410.06205), as transformers' ``proportional``.

    Args:
        partial_rotary_factor: Share of the pairs that keep rotating, fastest first, above 0 and at
            most 1. They keep their frequencies; those of the others are set to 0.
        factor: The frequencies that remain are divided by this, at least 1.
    """

    name = "proportional"

    factor: float = 1.0
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "partial_rotary_factor", above=0.0, most=1.0)

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the scaled frequencies of the rotating pairs, 0 for the others."""
        frequencies = geometry.inv_freq()
        frequencies[int(self.partial_rotary_factor * geometry.rotary_dim // 2) :] = 0.0
        return FrequencyPlan(frequencies / scale)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return transformers' ``proportional`` type; None if it would not load without a warning.

        That type rotates the whole head, and its validation does not know ``factor``.
        """
        if geometry.head_dim not in (None, geometry.rotary_dim) or self.factor != 1.0:
            return None
        return {
            "rope_type": "proportional",
            "partial_rotary_factor": self.partial_rotary_factor,
        }

"""Position interpolation: compress all positions into the trained range."""

from dataclasses import dataclass
from typing import Any

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling


@dataclass(frozen=True)
class Linear(Scaling):
    """Position Interpolation (Chen et al., 2023, arXiv:2306.15595): every pair slowed alike.

    ::

        inv_freq' = inv_freq / factor

    Args:
        factor: Target length over trained length, at least 1.
    """

    name = "linear"

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return all frequencies divided by ``scale``."""
        return FrequencyPlan(geometry.inv_freq() / scale)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return transformers' ``linear`` type."""
        return {"rope_type": "linear", "factor": self.factor}

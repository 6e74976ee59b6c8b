"""No scaling: the baseline of every comparison."""

from dataclasses import dataclass
from typing import Any

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method


@dataclass(frozen=True)
class NoScaling(Method):
    """Leave the trained frequencies unchanged."""

    name = "none"
    needs_rotation = False

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the trained frequencies."""
        return FrequencyPlan(geometry.inv_freq())

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Return transformers' ``default`` type."""
        return {"rope_type": "default"}

"""Dynamic NTK as in transformers: the base grows with the request, without an upper limit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method
from hf_rope_ext.methods.ntk import NTK


@dataclass(frozen=True)
class Dynamic(NTK):
    """Dynamic NTK (emozilla, 2023), with transformers' formula and its meaning of ``factor``.

    A request of T positions on a trained length of L gets NTK-aware scaling by ``factor * T / L -
    (factor - 1)``, and none within L. In every other method ``factor`` is target over trained
    length; here it is not: at T = factor * L the scale is factor ** 2 - factor + 1, for instance 13
    with ``factor=4``. Use `DynamicNTK` for a scale of T / L.

    Args:
        factor: Growth of the scale per trained length, at least 1.
    """

    name = "dynamic"

    @property
    def length_dependent(self) -> bool:
        """Whether the plan depends on the length of the request."""
        return True

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the trained frequencies."""
        return FrequencyPlan(geometry.inv_freq())

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the NTK-aware plan at the scale of each row."""
        ratio = torch.clamp(length / geometry.original_max_position_embeddings, min=1.0)
        return self.stretch(geometry, self.factor * ratio - (self.factor - 1))

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return static NTK-aware scaling at the scale of a request of ``length`` positions."""
        ratio = max(length / geometry.original_max_position_embeddings, 1.0)
        return NTK(self.factor * ratio - (self.factor - 1))

    def target_length(self, geometry: RopeGeometry) -> int:
        """Return the trained length, beyond which transformers starts to scale."""
        return geometry.original_max_position_embeddings

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Return transformers' ``dynamic`` type."""
        return {"rope_type": "dynamic", "factor": self.factor}

"""transformers' dynamic NTK: the base grows with the request, without a limit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method
from hf_rope_ext.methods.ntk import NTK


@dataclass(frozen=True)
class Dynamic(NTK):
    """Dynamic NTK (emozilla, 2023) with transformers' formula and meaning of ``factor``.

    Beyond the trained length L a request of length T gets NTK-aware scaling by ``factor * T / L -
    (factor - 1)``; within it, none. See `DynamicNTK` for the paper's form.

    Args:
        factor: A knob for how fast the scaling grows, at least 1, not the target over the trained
            length: at T = factor * L the scaling is factor ** 2 - factor + 1.
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
        """Return the NTK-aware plan at each row's own scale."""
        ratio = torch.clamp(length / geometry.original_max_position_embeddings, min=1.0)
        return self.stretch(geometry, self.factor * ratio - (self.factor - 1))

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return static NTK-aware scaling as a request of ``length`` gets it."""
        ratio = max(length / geometry.original_max_position_embeddings, 1.0)
        return NTK(self.factor * ratio - (self.factor - 1))

    def target_length(self, geometry: RopeGeometry) -> int:
        """Return the trained length, which transformers reads as the start of the growth."""
        return geometry.original_max_position_embeddings

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Return transformers' ``dynamic`` type."""
        return {"rope_type": "dynamic", "factor": self.factor}

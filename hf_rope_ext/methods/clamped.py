"""Methods that scale by the length of the request, up to their factor."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.linear import Linear
from hf_rope_ext.methods.method import Method, Stretched
from hf_rope_ext.methods.ntk import NTK
from hf_rope_ext.methods.yarn import Yarn


@dataclass(frozen=True)
class ClampedScale(Stretched):
    """A static method that follows the request: ``scale = clamp(length / trained, 1, factor)``.

    The paper's dynamic scaling (YaRN, arXiv:2309.00071, sec. 3.3): the stretch is what the request
    needs and no more, so a request within the trained length is left alone. Subclasses name the
    static method as their second base and in ``static``.
    """

    static: ClassVar[type[Stretched]]

    @property
    def length_dependent(self) -> bool:
        """Whether the plan depends on the length of the request."""
        return True

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the trained frequencies."""
        return FrequencyPlan(geometry.inv_freq())

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the static method's plan at each row's own scale."""
        trained = geometry.original_max_position_embeddings
        return self.stretch(geometry, torch.clamp(length / trained, 1.0, self.factor))

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the static method with the plan a request of ``length`` gets."""
        scale = length / geometry.original_max_position_embeddings
        knobs = {field.name: getattr(self, field.name) for field in fields(self.static)}
        return self.static(**{**knobs, "factor": min(max(scale, 1.0), self.factor)})

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return None: transformers has no type for it."""
        return None


@dataclass(frozen=True)
class DynamicLinear(ClampedScale, Linear):
    """Position Interpolation at ``clamp(length / trained, 1, factor)``.

    The scale is the paper's (YaRN, arXiv:2309.00071, sec. 3.3).

    Args:
        factor: The largest stretch, at least 1. Other knobs are those of `Linear`.
    """

    name = "dynamic_linear"

    static = Linear


@dataclass(frozen=True)
class DynamicNTK(ClampedScale, NTK):
    """NTK-aware scaling at ``clamp(length / trained, 1, factor)``.

    The scale is the paper's (YaRN, arXiv:2309.00071, sec. 3.3).

    Args:
        factor: The largest stretch, at least 1. Other knobs are those of `NTK`.
    """

    name = "dynamic_ntk"

    static = NTK


@dataclass(frozen=True)
class DynamicYarn(ClampedScale, Yarn):
    """YaRN at ``clamp(length / trained, 1, factor)``.

    The scale is the paper's (YaRN, arXiv:2309.00071, sec. 3.3).

    Args:
        factor: The largest stretch, at least 1. Other knobs are those of `Yarn`.
    """

    name = "dynamic_yarn"

    static = Yarn

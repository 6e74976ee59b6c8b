"""Methods whose scale follows the length of the request, up to their factor."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.linear import Linear
from hf_rope_ext.methods.method import Method, Scaling
from hf_rope_ext.methods.ntk import NTK
from hf_rope_ext.methods.yarn import Yarn


@dataclass(frozen=True)
class ClampedScale(Scaling):
    """A static method applied at ``scale = clamp(length / trained, 1, factor)``.

    This is the dynamic scaling of the paper (YaRN, arXiv:2309.00071, sec. 3.3): each request is
    scaled by what it needs, so requests within the trained length are unaffected. Subclasses name
    the static method as their second base and in ``static``.
    """

    static: ClassVar[type[Scaling]]

    @property
    def length_dependent(self) -> bool:
        """Whether the plan depends on the length of the request."""
        return True

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the trained frequencies."""
        return FrequencyPlan(geometry.inv_freq())

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the plan of the static method at the scale of each row."""
        trained = geometry.original_max_position_embeddings
        return self.stretch(geometry, torch.clamp(length / trained, 1.0, self.factor))

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the static method with the plan of a request of ``length`` positions."""
        scale = length / geometry.original_max_position_embeddings
        knobs = {field.name: getattr(self, field.name) for field in fields(self.static)}
        return self.static(**{**knobs, "factor": min(max(scale, 1.0), self.factor)})

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return None: transformers has no such type."""
        return None


@dataclass(frozen=True)
class DynamicLinear(ClampedScale, Linear):
    """Position Interpolation at ``clamp(length / trained, 1, factor)``.

    Args:
        factor: The largest scale, at least 1. The other knobs are those of `Linear`.
    """

    name = "dynamic_linear"

    static = Linear


@dataclass(frozen=True)
class DynamicNTK(ClampedScale, NTK):
    """NTK-aware scaling at ``clamp(length / trained, 1, factor)``.

    Args:
        factor: The largest scale, at least 1. The other knobs are those of `NTK`.
    """

    name = "dynamic_ntk"

    static = NTK


@dataclass(frozen=True)
class DynamicYarn(ClampedScale, Yarn):
    """YaRN at ``clamp(length / trained, 1, factor)``.

    Args:
        factor: The largest scale, at least 1. The other knobs are those of `Yarn`.
    """

    name = "dynamic_yarn"

    static = Yarn

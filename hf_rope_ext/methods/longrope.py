"""LongRoPE: searched per-pair rescale factors, one list within the trained length, one beyond."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.checks import require_number, shown
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method, store_factor, store_number


@dataclass(frozen=True)
class LongRope(Method):
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753), as transformers' ``longrope``.

    ::

        inv_freq'[i] = inv_freq[i] / (long_factor[i] if length > trained else short_factor[i])

    Cos and sin are multiplied by ``sqrt(1 + ln(factor) / ln(trained))`` at every length.

    Args:
        factor: Target length over trained length, at least 1; it only sets the temperature.
        long_factor: Rescale factor of each pair beyond the trained length, each above 0.
        short_factor: The same within the trained length; all 1 by default.
        attention_factor: Multiplier of cos and sin, in place of the formula.
    """

    name = "longrope"

    factor: float
    long_factor: Sequence[float]
    short_factor: Sequence[float] | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        store_factor(self)
        store_number(self, "attention_factor", optional=True, above=0.0)
        object.__setattr__(self, "long_factor", self._checked("long_factor"))
        if self.short_factor is None:
            object.__setattr__(self, "short_factor", (1.0,) * len(self.long_factor))
        object.__setattr__(self, "short_factor", self._checked("short_factor"))

    @property
    def length_dependent(self) -> bool:
        """Whether the two lists differ."""
        return self.long_factor != self.short_factor

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the plan with ``short_factor``, for requests up to the trained length."""
        return self._slowed(geometry, self._slowdown(geometry, "short_factor"))

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the plan of each row; a request of exactly the trained length is short."""
        beyond = length > geometry.original_max_position_embeddings
        long = self._slowdown(geometry, "long_factor")
        return self._slowed(
            geometry, torch.where(beyond, long, self._slowdown(geometry, "short_factor"))
        )

    def freeze(self, geometry: RopeGeometry, length: int) -> "LongRope":
        """Return the method that applies the plan of a request of ``length`` at every length."""
        beyond = length > geometry.original_max_position_embeddings
        slowdown = self._slowdown(geometry, "long_factor" if beyond else "short_factor").tolist()
        return LongRope(self.factor, slowdown, slowdown, self.temperature(geometry))

    def temperature(self, geometry: RopeGeometry) -> float:
        """Return the multiplier of cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        trained = geometry.original_max_position_embeddings
        return math.sqrt(1 + math.log(self.factor) / math.log(trained))

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Return transformers' ``longrope`` type."""
        return {
            "rope_type": "longrope",
            "factor": self.factor,
            "original_max_position_embeddings": geometry.original_max_position_embeddings,
            "short_factor": self._slowdown(geometry, "short_factor").tolist(),
            "long_factor": self._slowdown(geometry, "long_factor").tolist(),
            "attention_factor": self.temperature(geometry),
        }

    def _slowed(self, geometry: RopeGeometry, slowdown: Tensor) -> FrequencyPlan:
        return FrequencyPlan(geometry.inv_freq() / slowdown, self.temperature(geometry))

    def _slowdown(self, geometry: RopeGeometry, knob: str) -> Tensor:
        values = getattr(self, knob)
        if len(values) != geometry.pairs:
            raise MethodParameterError(
                f"{self.name}: {knob} needs one number for each of the model's {geometry.pairs} "
                f"pairs, got {len(values)}."
            )
        return torch.tensor(values, dtype=torch.float64, device=geometry.device)

    def _checked(self, knob: str) -> tuple[float, ...]:
        values = getattr(self, knob)
        if not isinstance(values, Sequence) or not values or isinstance(values, str):
            raise MethodParameterError(
                f"{self.name}: {knob} must be a list of numbers, one for each pair, got "
                f"{shown(values)}."
            )
        for pair, value in enumerate(values):
            name = f"{self.name}: {knob}[{pair}]"
            require_number(name, value, above=0.0, error=MethodParameterError)
        return tuple(map(float, values))

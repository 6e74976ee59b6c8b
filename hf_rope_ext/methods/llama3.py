"""Llama 3.1's scaling: a ramp over the number of rotations, without a temperature."""

from dataclasses import dataclass
from typing import Any

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling, store_number
from hf_rope_ext.methods.ntk_by_parts import NTKByParts, llama3_parameters


@dataclass(frozen=True)
class Llama3(Scaling):
    """The scaling of Llama 3.1 (arXiv:2407.21783): NTK-by-parts with the rotation ramp.

    Args:
        factor: Target length over trained length, at least 1.
        low_freq_factor: Pairs with fewer rotations in the trained length are slowed by ``factor``.
        high_freq_factor: Pairs with more rotations in the trained length are unchanged.
    """

    name = "llama3"

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "low_freq_factor", above=0.0)
        store_number(self, "high_freq_factor", above=0.0)
        if self.high_freq_factor <= self.low_freq_factor:
            raise MethodParameterError(
                f"{self.name}: high_freq_factor must be greater than low_freq_factor, got "
                f"{self.high_freq_factor!r} and {self.low_freq_factor!r}."
            )

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the interpolated frequencies."""
        by_parts = NTKByParts(
            factor=self.factor,
            beta_fast=self.high_freq_factor,
            beta_slow=self.low_freq_factor,
            ramp="rotation",
        )
        return by_parts.stretch(geometry, scale)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Return transformers' ``llama3`` type."""
        if self.factor == 1.0:
            return {"rope_type": "default"}
        return llama3_parameters(geometry, self.factor, self.low_freq_factor, self.high_freq_factor)

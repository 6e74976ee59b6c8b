"""A larger base (adjusted base frequency): every pair but the first slows down."""

from dataclasses import dataclass, replace
from typing import Any

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method, store_number


@dataclass(frozen=True)
class Base(Method):
    """Adjusted base frequency (Xiong et al., 2023, arXiv:2309.16039; Code Llama, arXiv:2308.12950).

    Args:
        rope_theta: The new base, greater than 1. 0.0424 * L ** 1.628 is a lower bound for a context
            of L positions (arXiv:2405.14591, fig. 1).
    """

    name = "base"

    rope_theta: float

    def __post_init__(self) -> None:
        """Check ``rope_theta``."""
        store_number(self, "rope_theta", above=1.0)

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the frequencies of the new base."""
        return FrequencyPlan(replace(geometry, base=self.rope_theta).inv_freq())

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Return transformers' ``default`` type with the new ``rope_theta``."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}

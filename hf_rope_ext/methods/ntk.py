"""NTK-aware scaling: a larger base, which slows the slow pairs and preserves the fast ones."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling


@dataclass(frozen=True)
class NTK(Scaling):
    """Static NTK-aware RoPE (bloc97, 2023; YaRN paper, arXiv:2309.00071, sec. 3.1).

    The base is chosen such that the first pair is unchanged and the last is slowed by exactly
    ``factor``::

        base' = base * factor ** (rotary_dim / (rotary_dim - 2))

    Args:
        factor: Target length over trained length, at least 1. Some pairs still exceed their trained
            angles, so the usable length is less than ``factor`` times the trained one.
    """

    name = "ntk"

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the frequencies of the larger base."""
        return FrequencyPlan(geometry.inv_freq() * scale ** -slowdown_exponents(geometry))

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return transformers' ``default`` type with the larger ``rope_theta``."""
        dim = geometry.rotary_dim
        if dim <= 2:
            return None
        return {
            "rope_type": "default",
            "rope_theta": geometry.base * self.factor ** (dim / (dim - 2)),
        }


def slowdown_exponents(geometry: RopeGeometry) -> Tensor:
    """Return ``2 * i / (rotary_dim - 2)``, from 0 for the first pair to 1 for the last."""
    dim = geometry.rotary_dim
    return geometry.exponents() * (dim / max(dim - 2, 1))

"""NTK-by-parts: preserve fast pairs, interpolate slow ones, and ramp between the two."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.checks import require_bool, require_choice
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling, store_number


@dataclass(frozen=True)
class NTKByParts(Scaling):
    """NTK-by-parts interpolation (YaRN paper, arXiv:2309.00071, sec. 3.2): YaRN, no temperature.

    Args:
        factor: Target length over trained length, at least 1.
        beta_fast: Pairs with more rotations than this in the trained length are unchanged.
        beta_slow: Pairs with fewer rotations than this are slowed by ``factor``.
        truncate: Whether the bounds of the index ramp are rounded to whole pairs.
        ramp: What the ramp is linear in: ``"index"``, the index of the pair, as in the authors'
            code and every framework; ``"rotation"``, its number of rotations, as in the paper.
        blend: What is averaged along the ramp: ``"arithmetic"``, frequencies, as in the paper;
            ``"harmonic"``, wavelengths, as in PoSE (arXiv:2309.10400).
    """

    name = "ntk_by_parts"

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    ramp: str = "index"
    blend: str = "arithmetic"

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "beta_fast", above=0.0)
        store_number(self, "beta_slow", above=0.0)
        name, error = self.name, MethodParameterError
        require_bool(f"{name}: truncate", self.truncate, error)
        require_choice(f"{name}: ramp", self.ramp, ("index", "rotation"), error)
        require_choice(f"{name}: blend", self.blend, ("arithmetic", "harmonic"), error)
        if self.beta_fast < self.beta_slow or (
            self.ramp == "rotation" and self.beta_fast == self.beta_slow
        ):
            raise MethodParameterError(
                f"{self.name}: beta_fast must be greater than beta_slow, got {self.beta_fast!r} "
                f"and {self.beta_slow!r}."
            )

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the blended frequencies."""
        trained = geometry.inv_freq()
        slowed = self.slowed_share(geometry)
        if self.blend == "harmonic":
            return FrequencyPlan(trained / (slowed * scale + (1 - slowed)))
        return FrequencyPlan(trained / scale * slowed + trained * (1 - slowed))

    def slowed_share(self, geometry: RopeGeometry) -> Tensor:
        """Return how far each pair is interpolated, 0 to 1, float64, ``(pairs,)``."""
        if self.ramp == "rotation":
            turns = geometry.rotations()
            return torch.clamp(
                (self.beta_fast - turns) / (self.beta_fast - self.beta_slow), 0.0, 1.0
            )
        low, high = self.correction_range(geometry)
        return torch.clamp((geometry.index() - low) / (high - low), 0.0, 1.0)

    def correction_range(self, geometry: RopeGeometry) -> tuple[float, float]:
        """Return the pair indices at which the index ramp starts and ends."""
        low = correction_pair(geometry, self.beta_fast)
        high = correction_pair(geometry, self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, geometry.rotary_dim - 1)
        # as in the authors' code, where an empty range makes the ramp a step
        return low, high + 0.001 if low == high else high

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return ``yarn`` without its temperature; for the rotation ramp, ``llama3``."""
        if self.factor == 1.0:
            return {"rope_type": "default"}
        if self.blend != "arithmetic":
            return None
        if self.ramp == "rotation":
            return llama3_parameters(geometry, self.factor, self.beta_slow, self.beta_fast)
        return self.yarn_parameters(geometry, attention_factor=1.0)

    def yarn_parameters(
        self, geometry: RopeGeometry, *, attention_factor: float
    ) -> dict[str, Any] | None:
        """Return the keys of transformers' ``yarn`` type; None if it would warn about them."""
        trained = geometry.original_max_position_embeddings
        # transformers warns unless the factor is exactly the ratio of two integer lengths
        if round(self.factor * trained) / trained != self.factor:
            return None
        parameters = {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": trained,
            "attention_factor": attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        return parameters if self.truncate else {**parameters, "truncate": False}


def correction_pair(geometry: RopeGeometry, rotations: float) -> float:
    """Return the fractional index of the pair with ``rotations`` in the trained length."""
    length = geometry.original_max_position_embeddings
    return (
        geometry.rotary_dim
        * math.log(length / (rotations * 2 * math.pi))
        / (2 * math.log(geometry.base))
    )


def llama3_parameters(
    geometry: RopeGeometry, factor: float, low_freq_factor: float, high_freq_factor: float
) -> dict[str, Any]:
    """Return the keys of transformers' ``llama3`` type."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": geometry.original_max_position_embeddings,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
    }

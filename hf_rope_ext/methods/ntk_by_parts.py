"""NTK-by-parts: fast pairs keep their frequency, slow pairs are interpolated, a ramp between."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Stretched, require_choice, require_real


@dataclass(frozen=True)
class NTKByParts(Stretched):
    """NTK-by-parts interpolation (YaRN paper, arXiv:2309.00071, sec. 3.2): YaRN, no temperature.

    Args:
        factor: Target length over trained length, at least 1.
        beta_fast: Pairs that made more turns than this in training are left alone.
        beta_slow: Pairs that made fewer turns than this are slowed by ``factor``.
        truncate: Whether the index ramp starts and ends at whole pairs.
        ramp: Along what the ramp between the two is linear: ``"index"``, the pair's index, as in
            the authors' code and every framework; ``"rotation"``, its turns, as in the paper.
        blend: What is mixed along the ramp: ``"arithmetic"``, frequencies, as in the paper;
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
        require_real(self, "beta_fast", above=0.0)
        require_real(self, "beta_slow", above=0.0)
        require_choice(self, "ramp", ("index", "rotation"))
        require_choice(self, "blend", ("arithmetic", "harmonic"))
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
        """Return per pair how much of it is interpolated, 0 to 1, float64, ``(pairs,)``."""
        if self.ramp == "rotation":
            turns = geometry.rotations()
            return torch.clamp(
                (self.beta_fast - turns) / (self.beta_fast - self.beta_slow), 0.0, 1.0
            )
        low, high = self.correction_range(geometry)
        return torch.clamp((geometry.index() - low) / (high - low), 0.0, 1.0)

    def correction_range(self, geometry: RopeGeometry) -> tuple[float, float]:
        """Return the pair index where the index ramp starts, and where it ends."""
        low = correction_pair(geometry, self.beta_fast)
        high = correction_pair(geometry, self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, geometry.rotary_dim - 1)
        # an empty range is a step, as in the authors' code
        return low, high + 0.001 if low == high else high

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return ``yarn`` without its temperature, or ``llama3``, which is the rotation ramp."""
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
        """Return the keys of transformers' ``yarn`` type, None where they would not load clean."""
        trained = geometry.original_max_position_embeddings
        # transformers warns unless the factor is exactly this ratio of two integers
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
    """Return the (fractional) index of the pair that made ``rotations`` turns in training."""
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

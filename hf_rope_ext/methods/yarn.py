"""YaRN: NTK-by-parts frequencies and an attention temperature."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import store_number
from hf_rope_ext.methods.ntk_by_parts import NTKByParts


@dataclass(frozen=True)
class Yarn(NTKByParts):
    """YaRN (Peng et al., 2023, arXiv:2309.00071, sec. 3.4), with transformers' defaults.

    Cos and sin are multiplied by ``0.1 * ln(factor) + 1``, hence attention logits by its square.

    Args:
        factor: Target length over trained length, at least 1.
        beta_fast: See `NTKByParts`, as for the four knobs that follow it there.
        attention_factor: Multiplier of cos and sin, in place of the formula.
        mscale: With ``mscale_all_dim``, cos and sin are multiplied by ``m(mscale) /
            m(mscale_all_dim)``, where ``m(k) = k * 0.1 * ln(factor) + 1`` (DeepSeek).
        mscale_all_dim: In families with multi-head latent attention, the softmax scale is also
            multiplied by ``m(mscale_all_dim) ** 2``.
        temperature_coefficient: The 0.1 of these formulas.
    """

    name = "yarn"

    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    temperature_coefficient: float = 0.1

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "temperature_coefficient", least=0.0)
        for knob in ("attention_factor", "mscale", "mscale_all_dim"):
            store_number(self, knob, optional=True, above=0.0)
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise MethodParameterError(
                f"{self.name}: mscale and mscale_all_dim only work together, got {self.mscale!r} "
                f"and {self.mscale_all_dim!r}; to set the temperature alone use attention_factor."
            )

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the blended frequencies, with the temperature at ``scale``."""
        plan = super().stretch(geometry, scale)
        softmax_scaling = 1.0
        if self.mscale_all_dim is not None:
            softmax_scaling = float(self.magnitude(self.factor, self.mscale_all_dim)) ** 2
        return replace(
            plan, attention_scaling=self.temperature(scale), softmax_scaling=softmax_scaling
        )

    def temperature(self, scale: Scale) -> Scale:
        """Return the multiplier of cos and sin at ``scale``."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self.magnitude(scale, self.mscale) / self.magnitude(scale, self.mscale_all_dim)
        return self.magnitude(scale, 1.0)

    def magnitude(self, scale: Scale, weight: float) -> Scale:
        """Return ``weight * temperature_coefficient * ln(scale) + 1``."""
        log_scale = torch.log(scale) if isinstance(scale, torch.Tensor) else math.log(scale)
        return weight * self.temperature_coefficient * log_scale + 1.0

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return transformers' ``yarn`` type; None for ramps and blends that it lacks."""
        temperature = self.temperature(self.factor)
        if self.factor == 1.0 and temperature == 1.0:
            return {"rope_type": "default"}
        if self.blend != "arithmetic" or self.ramp != "index":
            return None
        parameters = self.yarn_parameters(geometry, attention_factor=float(temperature))
        if parameters is not None and self.mscale_all_dim is not None:
            parameters |= {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        return parameters

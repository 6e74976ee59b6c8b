"""Giraffe's modifications of the frequencies: power scaling and truncation."""

import math
from dataclasses import dataclass

import torch

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling, store_number


@dataclass(frozen=True)
class Giraffe(Scaling):
    """Power and truncated bases (Pal et al., 2023, arXiv:2308.10882), in the order of its code.

    Args:
        factor: Every frequency is first divided by this, at least 1.
        power: Frequency ``i`` is then multiplied by ``(1 - i / pairs) ** power``, at least 0.
        truncated_length: Wavelengths above this many positions are set to 16 times as many, and
            frequencies to 0 where the wavelength was above 8 times as many.
    """

    name = "giraffe"

    factor: float = 1.0
    power: float = 0.0
    truncated_length: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "power", least=0.0)
        store_number(self, "truncated_length", optional=True, above=0.0)
        if self.power == 0.0 and self.truncated_length is None:
            raise MethodParameterError(f"{self.name}: give power, truncated_length, or both.")

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the modified frequencies."""
        remaining = 1 - geometry.index() / geometry.pairs
        frequencies = geometry.inv_freq() / scale * remaining**self.power
        if self.truncated_length is not None:
            cutoff = 2 * math.pi / self.truncated_length
            slow, still = frequencies < cutoff, frequencies < cutoff / 8
            frequencies = torch.where(slow, cutoff / 16, frequencies).masked_fill(still, 0.0)
        return FrequencyPlan(frequencies)

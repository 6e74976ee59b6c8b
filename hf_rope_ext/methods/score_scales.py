"""Score scales: attention stays as sharp over more keys."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    Distances,
    ScoreScale,
    require_positions,
    store_optional_factor,
    targeted,
)
from hf_rope_ext.methods.method import Method, store_number
from hf_rope_ext.methods.none import NoScaling

MOST_SCALE = 1000.0
"""The largest knob with which scores stay within float32."""


@dataclass(frozen=True)
class LogN(ScoreScale):
    """Scores of a query at m times max(1, ln(m + 1) / ln L), L the trained length.

    Su, 2021 and 2023 (kexue.fm/archives/8823 and 9444), as in Qwen-1. Queries within the trained
    length are computed as ever.

    Args:
        method: The method it is combined with.
    """

    name = "logn"

    method: Method = field(default_factory=NoScaling)

    def factors(self, asked: Distances) -> Tensor:
        """Return the factor of each query."""
        return (torch.log1p(asked.query.clamp(min=0)) / math.log(asked.trained)).clamp(min=1.0)


@dataclass(frozen=True)
class Temperature(ScoreScale):
    """Scores times (coefficient * ln(T / L) + 1) ** 2, for T positions on a trained length of L.

    YaRN's temperature (arXiv:2309.00071, sec. 3.4), for methods that have none.

    Args:
        method: The method it is combined with.
        coefficient: YaRN's 0.1 by default.
        factor: T / L; by default that of each request, at least 1.
    """

    name = "temperature"

    method: Method = field(default_factory=NoScaling)
    coefficient: float = 0.1
    factor: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        store_optional_factor(self)
        store_number(self, "coefficient", least=0.0, most=MOST_SCALE)

    @property
    def follows_length(self) -> bool:
        """Whether T is that of each request."""
        return self.factor is None

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the target length of the other method, else that of ``factor``."""
        return self.method.target_length(geometry) or Method.target_length(self, geometry)

    def factors(self, asked: Distances) -> Tensor:
        """Return the factor, the same for every query of a row."""
        ratio = (targeted(self.factor, asked) / asked.trained).clamp(min=1.0)
        return (self.coefficient * torch.log(ratio) + 1.0) ** 2


@dataclass(frozen=True)
class Llama4(ScoreScale):
    """Scores of a query at m times 1 + scale * ln(floor((m + 1) / floor) + 1).

    What Llama 4 and Ministral 3 were trained with, for other models.

    Args:
        method: The method it is combined with.
        scale: Growth of the factor; ``attn_scale`` in Llama 4's config.
        floor: Positions before the first step; ``floor_scale`` there. The trained length by
            default.
    """

    name = "llama4"

    method: Method = field(default_factory=NoScaling)
    scale: float = 0.1
    floor: int | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        store_number(self, "scale", least=0.0, most=MOST_SCALE)
        require_positions(self, "floor")

    def factors(self, asked: Distances) -> Tensor:
        """Return the factor of each query."""
        floor = asked.trained if self.floor is None else self.floor
        return 1.0 + self.scale * torch.log1p(((asked.query.clamp(min=0) + 1) / floor).floor())

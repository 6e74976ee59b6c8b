"""Position maps: positions beyond the trained length advance more slowly.

The three formulas are what some texts call segmented YaRN. They are not in YaRN's paper
(arXiv:2309.00071), which changes frequencies and no positions. With m a position and L the trained
length, positions up to L stay in all of them. Queries and keys are mapped alike.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods.attention_method import (
    AttentionMethod,
    Band,
    Distances,
)
from hf_rope_ext.methods.method import store_number

REACH = 1.5
"""Where ``factor`` puts the target position, in trained lengths."""


@dataclass(frozen=True)
class PositionMap(AttentionMethod):
    """A map of positions beyond the trained length; subclasses have one knob."""

    @abc.abstractmethod
    def beyond(self, positions: Tensor, trained: int) -> Tensor:
        """Return where positions beyond the trained length go."""

    def check(self, geometry: RopeGeometry) -> None:
        """Check that the knob is given, or a factor to choose it by."""
        knob = next(name for name in vars(self) if name not in ("method", "factor"))
        if getattr(self, knob) is None and self.factor is None:
            raise MethodParameterError(f"{self.name} needs {knob} or factor (or target_length).")

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return one band of mapped positions."""
        query, key = (
            torch.where(
                one > asked.trained,
                self.beyond(one.clamp(min=asked.trained), asked.trained),
                one,
            )
            for one in (asked.query, asked.key)
        )
        return (Band(query=query, key=key),)

    @property
    def chosen(self) -> float:
        """The factor that knobs are chosen by."""
        assert self.factor is not None  # `check` asked for it
        return self.factor


@dataclass(frozen=True)
class Piecewise(PositionMap):
    """Positions beyond the trained length L go to L + (m - L) / slowdown.

    Args:
        method: The method whose frequencies it rotates by.
        factor: Target length over trained length, instead of ``slowdown``: the target length goes
            to 1.5 L.
        slowdown: How much more slowly positions advance, at least 1, which changes nothing.
    """

    name = "piecewise"

    slowdown: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "slowdown", optional=True, least=1.0)

    def beyond(self, positions: Tensor, trained: int) -> Tensor:
        """Return the mapped positions."""
        slowdown = self.slowdown
        if slowdown is None:
            slowdown = max((self.chosen - 1) / (REACH - 1), 1.0)
        return trained + (positions - trained) / slowdown


@dataclass(frozen=True)
class Power(PositionMap):
    """Positions beyond the trained length L go to m / (m / L) ** exponent.

    Args:
        method: The method whose frequencies it rotates by.
        factor: Target length over trained length, instead of ``exponent``: the target length goes
            to 1.5 L.
        exponent: From 0, which changes nothing, to 1, where all of them go to L.
    """

    name = "power"

    exponent: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "exponent", optional=True, least=0.0, most=1.0)

    def beyond(self, positions: Tensor, trained: int) -> Tensor:
        """Return the mapped positions."""
        exponent = self.exponent
        if exponent is None:
            fits = self.chosen <= REACH
            exponent = 0.0 if fits else 1 - math.log(REACH) / math.log(self.chosen)
        return positions / (positions / trained) ** exponent


@dataclass(frozen=True)
class Ramp(PositionMap):
    """Positions beyond the trained length L go to m / (1 + slope * (m - L) / L).

    Args:
        method: The method whose frequencies it rotates by.
        factor: Target length over trained length, instead of ``slope``: the target length goes to
            1.5 L.
        slope: From 0, which changes nothing, to 1, where all of them go to L.
    """

    name = "ramp"

    slope: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "slope", optional=True, least=0.0, most=1.0)

    def beyond(self, positions: Tensor, trained: int) -> Tensor:
        """Return the mapped positions."""
        slope = self.slope
        if slope is None:
            fits = self.chosen <= REACH
            slope = 0.0 if fits else (self.chosen / REACH - 1) / (self.chosen - 1)
        return positions / (1 + slope * (positions - trained) / trained)

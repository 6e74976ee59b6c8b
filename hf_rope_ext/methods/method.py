"""The shape every method has."""

import abc
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale


class Method(abc.ABC):
    """A rule from trained geometry to frequencies; subclasses are frozen dataclasses of knobs."""

    name: ClassVar[str]

    @abc.abstractmethod
    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the plan for ``geometry``; of a length-dependent method, its trained form."""

    @property
    def length_dependent(self) -> bool:
        """Whether the plan depends on the length of the request."""
        return False

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the plan of requests that long.

        Args:
            geometry: What was trained.
            length: Largest position + 1 of each row, float64, shape ``(batch, 1, 1)``.

        Returns:
            A plan whose ``inv_freq`` has shape ``(batch, 1, pairs)``.
        """
        raise NotImplementedError(f"{self.name} does not depend on the length")

    def freeze(self, geometry: RopeGeometry, length: int) -> "Method":
        """Return the static method with the plan a request of ``length`` gets."""
        return self

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the length, in positions, that the method is for; None where it does not say."""
        factor: float | None = getattr(self, "factor", None)
        return None if factor is None else round(factor * geometry.original_max_position_embeddings)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return the scaling keys of transformers' config that mean this method exactly.

        None where transformers has no such ``rope_type``; a static plan can then still be written
        as its frequencies (see `hf_rope_ext.models.rope_config`).
        """
        return None


@dataclass(frozen=True)
class Stretched(Method):
    """A static method with one stretch for every request.

    Args:
        factor: Target length over trained length, at least 1; 1 changes nothing.
    """

    factor: float

    def __post_init__(self) -> None:
        """Check ``factor``."""
        require_real(self, "factor", minimum=1.0)

    @abc.abstractmethod
    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the plan at ``scale``, a number or one number per row."""

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the plan at ``factor``."""
        return self.stretch(geometry, self.factor)


class Modifier(Method):
    """A rule applied to what another method planned, after it.

    Subclasses are frozen dataclasses with a field ``method`` and implement `modify`.
    """

    method: Method

    @abc.abstractmethod
    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return changed frequencies, same shape (the last dimension is the pairs)."""

    @property
    def length_dependent(self) -> bool:
        """Whether the modified method's plan depends on the length."""
        return self.method.length_dependent

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the modified plan; a length-dependent method's trained form stays as it is."""
        planned = self.method.plan(geometry)
        if self.length_dependent:
            return planned
        return replace(planned, inv_freq=self.modify(geometry, planned.inv_freq))

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the modified plan of requests that long."""
        planned = self.method.plan_at(geometry, length)
        return replace(planned, inv_freq=self.modify(geometry, planned.inv_freq))

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the same rule over the frozen method."""
        return replace(self, method=self.method.freeze(geometry, length))  # type: ignore[type-var]

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the modified method's target."""
        return self.method.target_length(geometry)


def require_real(
    method: Method, knob: str, *, minimum: float = -math.inf, above: float = -math.inf
) -> None:
    """Check that a knob is a finite number in range, and store it as a float.

    Raises:
        MethodParameterError: If it is not; bools and numeric strings are not numbers.
    """
    value = getattr(method, knob)
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < minimum or value <= above:
        bound = f"at least {minimum:g}" if above == -math.inf else f"greater than {above:g}"
        raise MethodParameterError(
            f"{method.name}: {knob} must be a finite number {bound}, got {value!r}."
        )
    object.__setattr__(method, knob, float(value))


def require_choice(method: Method, knob: str, choices: tuple[str, ...]) -> None:
    """Check that a knob is one of a few words.

    Raises:
        MethodParameterError: If it is not.
    """
    value = getattr(method, knob)
    if value not in choices:
        raise MethodParameterError(
            f"{method.name}: {knob} must be one of {', '.join(map(repr, choices))}, got {value!r}."
        )

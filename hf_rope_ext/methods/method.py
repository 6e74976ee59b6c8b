"""The interface of every method."""

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_rope_ext.checks import require_number, shown
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale

LARGEST_FACTOR = 2.0**30
"""With any trained length, the target then counts positions that an int64 holds."""


class Method(abc.ABC):
    """A rule from the trained geometry to frequencies; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    patched: ClassVar[Callable[..., AbstractContextManager[nn.Module]]]
    """`hf_rope_ext.patched`; set by the patching package, since methods import torch alone."""
    needs_rotation: ClassVar[bool] = True
    """Whether it does nothing on a model that does not rotate."""
    stops_rotation: ClassVar[bool] = False
    """Whether nothing rotates under it."""

    def __call__(self, model: nn.Module, **arguments: Any) -> AbstractContextManager[nn.Module]:
        """Return a context manager that patches the model, as `hf_rope_ext.patched` does.

        Args:
            model: The model to patch.
            **arguments: Other arguments of `patch_model`.
        """
        return self.patched(model, self, **arguments)

    @abc.abstractmethod
    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the plan for a geometry; if length-dependent, the one up to the trained length."""

    @property
    def length_dependent(self) -> bool:
        """Whether the plan depends on the length of the request."""
        return False

    @property
    def frequencies_follow(self) -> bool:
        """Whether the frequencies, and not only the attention, depend on that length."""
        return self.length_dependent

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the plan for requests of given lengths.

        Args:
            geometry: The trained geometry.
            length: Largest position + 1 of each row, float64, shape ``(batch, 1, 1)``.

        Returns:
            A plan whose ``inv_freq`` has shape ``(batch, 1, pairs)``.
        """
        raise NotImplementedError(f"{self.name} does not depend on the length")

    def freeze(self, geometry: RopeGeometry, length: int) -> "Method":
        """Return the static method with the plan of a request of ``length`` positions."""
        return self

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the intended length in positions; None if the method implies none."""
        factor: float | None = getattr(self, "factor", None)
        return None if factor is None else round(factor * geometry.original_max_position_embeddings)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """Return the scaling keys of transformers' config that mean exactly this method.

        None if transformers has no such ``rope_type``; a static plan can still be saved as explicit
        frequencies (see `hf_rope_ext.models.rope_config`).
        """
        return None


@dataclass(frozen=True)
class Scaling(Method):
    """A static method with one scale for all requests.

    Args:
        factor: Target length over trained length, at least 1; 1 changes nothing.
    """

    factor: float

    def __post_init__(self) -> None:
        """Check ``factor``."""
        store_factor(self)

    @abc.abstractmethod
    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the plan at ``scale``, one number or one per row."""

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the plan at ``factor``."""
        return self.stretch(geometry, self.factor)


class Modifier(Method):
    """A rule applied to the frequencies of another method.

    Subclasses are frozen dataclasses with a field ``method`` and implement `modify`.
    """

    method: Method

    @abc.abstractmethod
    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return modified frequencies of the same shape; the last dimension is the pairs."""

    @property
    def length_dependent(self) -> bool:
        """Whether the plan of the modified method depends on the length."""
        return self.method.length_dependent

    @property
    def frequencies_follow(self) -> bool:
        """Whether the frequencies of the modified method depend on the length."""
        return self.method.frequencies_follow

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the modified plan; of a length-dependent method, the trained one unmodified."""
        planned = self.method.plan(geometry)
        if self.length_dependent:
            return planned
        return replace(planned, inv_freq=self.modify(geometry, planned.inv_freq))

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the modified plan for requests of given lengths."""
        planned = self.method.plan_at(geometry, length)
        return replace(planned, inv_freq=self.modify(geometry, planned.inv_freq))

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the same rule applied to the frozen method."""
        return replace(self, method=self.method.freeze(geometry, length))  # type: ignore[type-var]

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the target length of the modified method."""
        return self.method.target_length(geometry)


def store_factor(method: Method) -> None:
    """Check that a method's factor is at least 1 and no more than lengths can hold, and store it.

    Raises:
        MethodParameterError: If it is not.
    """
    store_number(method, "factor", least=1.0)
    store_number(method, "factor", most=LARGEST_FACTOR)


def store_number(method: Method, knob: str, *, optional: bool = False, **bounds: float) -> None:
    """Check that a knob is a finite number within bounds, and store it as a float.

    Args:
        method: The method under construction.
        knob: Name of the knob.
        optional: Whether None is allowed.
        **bounds: Bounds as in `require_number`.

    Raises:
        MethodParameterError: If it is not.
    """
    value = getattr(method, knob)
    if value is None and optional:
        return
    name = f"{method.name}: {knob}"
    require_number(name, value, **bounds, error=MethodParameterError)
    single = torch.finfo(torch.float32)
    if value != 0 and not single.tiny <= abs(value) <= single.max:
        raise MethodParameterError(
            f"{name} must be a number that float32 can hold, which models compute in, got "
            f"{shown(value)}."
        )
    object.__setattr__(method, knob, float(value))

"""A method of its own for each position axis of M-RoPE."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Method
from hf_rope_ext.methods.none import NoScaling


@dataclass(frozen=True)
class PerAxis(Method):
    """Another method for the pairs of each position axis, so that time is not tied to space.

    In M-RoPE (Qwen2-VL, arXiv:2409.12191, sec. 2.1) each pair turns by one axis of the position.
    Each axis's pairs take the frequencies that its method plans for the whole head. A temperature
    concerns the logit, to which all pairs add up: cos and sin are multiplied by the largest.

    Args:
        methods: Methods by name of the axis, in a mapping or in pairs; the pairs of an axis that is
            not named turn as in training.
    """

    name = "per_axis"

    methods: tuple[tuple[str, Method], ...]

    def __post_init__(self) -> None:
        """Check the methods, and keep them in a form that cannot change."""
        if isinstance(self.methods, Mapping):
            object.__setattr__(self, "methods", tuple(self.methods.items()))
        if not self.methods:
            raise MethodParameterError(f"{self.name}: name at least one axis, got none.")
        for axis, method in self.methods:
            if not isinstance(method, Method) or isinstance(method, PerAxis):
                raise MethodParameterError(
                    f"{self.name}: the method of axis {axis!r} must be a method of one axis, got "
                    f"{method!r}."
                )

    @property
    def length_dependent(self) -> bool:
        """Whether the method of any axis depends on the length of the request."""
        return any(method.length_dependent for _, method in self.methods)

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return each axis's plan for its pairs.

        Raises:
            MethodParameterError: If positions have one axis.
        """
        return self._join(geometry, lambda method: method.plan(geometry))

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return each axis's plan for requests that long, over all axes."""
        return self._join(
            geometry,
            lambda method: (
                method.plan_at(geometry, length)
                if method.length_dependent
                else method.plan(geometry)
            ),
        )

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the same over frozen methods."""
        return PerAxis(tuple((axis, one.freeze(geometry, length)) for axis, one in self.methods))

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the longest target of any axis."""
        targets = [method.target_length(geometry) for _, method in self.methods]
        return max((target for target in targets if target is not None), default=None)

    def for_axes(self, geometry: RopeGeometry) -> Method:
        """Return the one method of all the axes there are, or itself where they differ.

        Raises:
            MethodParameterError: If positions have one axis, or none of a name.
        """
        _require_axes(self, geometry)
        own, known = dict(self.methods), dict.fromkeys(geometry.axes or ())
        for axis in own:
            if axis not in known:
                raise MethodParameterError(
                    f"there is no axis {axis!r}; the pairs of this model turn by "
                    f"{', '.join(map(repr, known))}."
                )
        used = {own.get(axis, NoScaling()) for axis in known}
        return used.pop() if len(used) == 1 else self

    def _join(
        self, geometry: RopeGeometry, planned: Callable[[Method], FrequencyPlan]
    ) -> FrequencyPlan:
        _require_axes(self, geometry)
        assert geometry.axes is not None  # checked above
        own = dict(self.methods)
        names = sorted(set(geometry.axes))
        plans = [planned(own.get(name, NoScaling())) for name in names]
        inv_freq = plans[0].inv_freq
        scaling: Scale = plans[0].attention_scaling
        for name, plan in zip(names[1:], plans[1:], strict=True):
            chosen = torch.tensor([axis == name for axis in geometry.axes], device=inv_freq.device)
            inv_freq = torch.where(chosen, plan.inv_freq, inv_freq)
            scaling = _larger(scaling, plan.attention_scaling)
        softmax = max(plan.softmax_scaling for plan in plans)
        return FrequencyPlan(inv_freq, scaling, softmax)


def _require_axes(method: PerAxis, geometry: RopeGeometry) -> None:
    if geometry.axes is None:
        raise MethodParameterError(
            f"values by axis ({', '.join(repr(axis) for axis, _ in method.methods)}) are for "
            f"models whose pairs each turn by one of several position axes (M-RoPE), as the pairs "
            f"of this one do not; give one method and one value of each knob."
        )


def _larger(one: Scale, other: Scale) -> Scale:
    if isinstance(one, Tensor):
        return torch.maximum(one, other) if isinstance(other, Tensor) else one.clamp(min=other)
    return other.clamp(min=one) if isinstance(other, Tensor) else max(one, other)

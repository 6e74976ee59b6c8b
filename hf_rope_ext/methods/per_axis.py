"""A separate method for each position axis of M-RoPE."""

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
    """A separate method for the pairs of each position axis, such as time and space.

    In M-RoPE (Qwen2-VL, arXiv:2409.12191, sec. 2.1) one axis of the position rotates each pair. The
    pairs of an axis take the frequencies that its method plans for the whole head. A temperature
    acts on the logit, to which all pairs contribute: the largest one multiplies all cos and sin.

    Args:
        methods: Methods by axis name, as a mapping or as pairs; pairs of other axes keep their
            trained frequencies.
    """

    name = "per_axis"

    methods: tuple[tuple[str, Method], ...]

    def __post_init__(self) -> None:
        """Check the methods, and store them immutably."""
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
        """Return the plan, made of those of each axis.

        Raises:
            MethodParameterError: If positions have a single axis.
        """
        return self._join(geometry, lambda method: method.plan(geometry))

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the plan for requests of given lengths, measured over all axes."""
        return self._join(
            geometry,
            lambda method: (
                method.plan_at(geometry, length)
                if method.length_dependent
                else method.plan(geometry)
            ),
        )

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the frozen methods, by axis."""
        frozen = ((axis, method.freeze(geometry, length)) for axis, method in self.methods)
        return PerAxis(tuple(frozen))

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the longest target length of any axis."""
        targets = [method.target_length(geometry) for _, method in self.methods]
        return max((target for target in targets if target is not None), default=None)

    def for_axes(self, geometry: RopeGeometry) -> Method:
        """Return the common method if all axes of a model have the same one, otherwise itself.

        Raises:
            MethodParameterError: If positions have a single axis, or lack a named one.
        """
        _require_axes(self, geometry)
        by_axis, known = dict(self.methods), dict.fromkeys(geometry.axes or ())
        for axis in by_axis:
            if axis not in known:
                raise MethodParameterError(
                    f"there is no axis {axis!r}; the pairs of this model turn by "
                    f"{', '.join(map(repr, known))}."
                )
        used = {by_axis.get(axis, NoScaling()) for axis in known}
        return used.pop() if len(used) == 1 else self

    def _join(
        self, geometry: RopeGeometry, planned: Callable[[Method], FrequencyPlan]
    ) -> FrequencyPlan:
        _require_axes(self, geometry)
        assert geometry.axes is not None  # checked above
        by_axis = dict(self.methods)
        names = sorted(set(geometry.axes))
        plans = [planned(by_axis.get(name, NoScaling())) for name in names]
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
            f"models whose pairs each turn by one of several position axes (M-RoPE), which this "
            f"one's do not; give one method, and one value per knob."
        )


def _larger(left: Scale, right: Scale) -> Scale:
    if isinstance(left, Tensor):
        return torch.maximum(left, right) if isinstance(right, Tensor) else left.clamp(min=right)
    return right.clamp(min=left) if isinstance(right, Tensor) else max(left, right)

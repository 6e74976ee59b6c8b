"""The arguments of `patch_model`: their checks, and the method and policy they make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rope_ext.checks import require_choice, require_integer
from hf_rope_ext.errors import MethodParameterError, RopeError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import (
    Dynamic,
    Method,
    PerAxis,
    knobs,
    make_method,
    make_per_axis,
    split_name,
)
from hf_rope_ext.positions.layouts import MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions
from hf_rope_ext.rotary.request_plan import RequestPlan, RequestPolicy

TEMPERATURES = ("rotation", "logits")
TARGETS = ("text", "vision")
LONGEST = 2**53
"""The longest length in positions: beyond it, float64 has not every integer."""
TEXT_ARGUMENTS = (
    "layer_types",
    "limit_only",
    "mrope_layout",
    "visual_positions",
    "requests",
    "on_growth",
    "buckets",
    "compat",
    "on_plan",
)
"""Arguments for text models only."""


@dataclass(frozen=True)
class PatchArguments:
    """The arguments of `patch_model`; see there."""

    method: str | Method | Mapping[str, str | Method]
    factor: float | Mapping[str, float] | None = None
    target_length: int | None = None
    original_max_position_embeddings: int | Sequence[int] | None = None
    layer_types: Sequence[str] | None = None
    limit_only: bool = False
    mrope_layout: str | MRopeLayout | None = None
    visual_positions: VisualPositions | None = None
    temperature: str = "rotation"
    replace: bool = False
    requests: RequestPolicy | None = None
    on_growth: str | None = None
    buckets: float | None = None
    compat: str | None = None
    on_plan: Callable[[RequestPlan], None] | None = None
    target: str = "text"
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_keywords(cls, method: Any, **arguments: Any) -> "PatchArguments":
        """Return the arguments from keywords that include the method's knobs."""
        names = {name for name in cls.__dataclass_fields__ if name not in ("method", "knobs")}
        return cls(
            method,
            **{name: value for name, value in arguments.items() if name in names},
            knobs={name: value for name, value in arguments.items() if name not in names},
        )

    def check(self) -> None:
        """Check what does not depend on the model.

        Raises:
            RopeError: If a value is not allowed, or the method is unknown.
        """
        if not isinstance(self.method, Method | Mapping):
            split_name(self.method)
        require_choice("temperature", self.temperature, TEMPERATURES, MethodParameterError)
        require_choice("target", self.target, TARGETS, MethodParameterError)
        trained = self.original_max_position_embeddings
        lengths = trained if isinstance(trained, list | tuple) else (trained,)
        named = [("original_max_position_embeddings", length, 2) for length in lengths]
        for name, length, least in [("target_length", self.target_length, 1), *named]:
            if length is not None:
                require_integer(
                    name, length, least, LONGEST, unit="positions", error=MethodParameterError
                )
        layer_types = self.layer_types
        if layer_types is not None and (
            isinstance(layer_types, str)
            or not all(isinstance(label, str) for label in layer_types)
            or not layer_types
        ):
            raise RopeError(f"layer_types must be a list of layer types, got {layer_types!r}.")

    def make_method(self, geometry: RopeGeometry, *others: RopeGeometry) -> Method:
        """Return the method with its factor, by axis where any argument is given by axis.

        Args:
            geometry: The first geometry of the model, which a factor is computed from.
            *others: Further geometries, which must agree.
        """
        values = {**self.knobs, **({} if self.factor is None else {"factor": self.factor})}
        if isinstance(self.method, Method) and values:
            raise MethodParameterError(
                f"{next(iter(values))} is already set by the method object ({self.method!r}); "
                f"pass one or the other."
            )
        if isinstance(self.method, PerAxis):
            method = self.method.for_axes(geometry)
        elif isinstance(self.method, Method):
            method = self.method
        elif any(isinstance(value, Mapping) for value in (self.method, *values.values())):
            method = make_per_axis(self.method, values).for_axes(geometry)
        else:
            method = self._make_named(self.method, geometry)  # type: ignore[arg-type]
        scaled = (geometry,) if self.limit_only else (geometry, *others)
        _require_agreement(method, scaled, self.target_length)
        return method

    def make_policy(self, method: Method) -> RequestPolicy:
        """Return the request policy, which only length-dependent methods take."""
        flat = {
            name: getattr(self, name)
            for name in ("on_growth", "buckets", "compat", "on_plan")
            if getattr(self, name) is not None
        }
        policy = self.requests
        if policy is not None and not isinstance(policy, RequestPolicy):
            raise MethodParameterError(
                f"requests must be a RequestPolicy, got {policy!r}: "
                f"requests=RequestPolicy(on_growth='error')."
            )
        if policy is not None and flat:
            raise MethodParameterError(
                f"{next(iter(flat))} is given beside requests={policy!r}; set it there."
            )
        if (policy is not None or flat) and not method.length_dependent:
            raise MethodParameterError(
                f"{next(iter(flat), 'requests')} is for methods that follow the length of the "
                f"request; {method!r} is the same at every length."
            )
        return RequestPolicy(**flat) if policy is None else policy

    def find_limit(self, method: Method, *geometries: RopeGeometry) -> int:
        """Return the length limit that ``limit_only`` sets."""
        implied = {self.target_length or method.target_length(one) for one in geometries}
        target = implied.pop()
        if target is None or implied:
            raise MethodParameterError(
                "limit_only raises the length limit alone: pass target_length"
                + (", since trained lengths differ." if implied else " or a factor.")
            )
        return target

    def _make_named(self, name: str, geometry: RopeGeometry) -> Method:
        """Return the method with its factor, computed from the target length if that was given."""
        trained = geometry.original_max_position_embeddings
        target, factor = self.target_length, self.factor
        values = dict(self.knobs)
        if factor is not None:
            values["factor"] = factor
        elif target is not None and _stretches(name):
            if target < trained:
                raise MethodParameterError(
                    f"target_length={target} is less than the trained length {trained}; there is "
                    f"nothing to extend."
                )
            values["factor"] = target / trained
        return make_method(name, **values)


def _stretches(name: str) -> bool:
    """Return whether the method's factor is target length over trained length."""
    classes = split_name(name)
    return Dynamic not in classes and any("factor" in knobs(cls) for cls in classes)


def _require_agreement(
    method: Method, geometries: Sequence[RopeGeometry], target: int | None
) -> None:
    """Check that a method is for the target length, on every trained length of the model."""
    trained = [geometry.original_max_position_embeddings for geometry in geometries]
    for length, implied in zip(trained, map(method.target_length, geometries), strict=True):
        if implied is None:
            continue
        if implied > LONGEST:
            raise MethodParameterError(
                f"{method!r} is for {implied} positions on a trained length of {length}; the most "
                f"is {LONGEST}."
            )
        if target not in (None, implied):
            rest = "give one of the two."
            if len(set(trained)) > 1:
                rest = (
                    f"parts of this model were trained at {', '.join(map(str, trained))} "
                    f"positions, so give a factor, by which each is extended."
                )
            raise MethodParameterError(
                f"target_length={target} contradicts {method!r}, which is for {implied} positions "
                f"on a trained length of {length}; {rest}"
            )

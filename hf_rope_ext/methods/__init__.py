"""The methods, by name.

A new method is one file beside these and one line in `METHODS`; it then works on every family.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from hf_rope_ext.errors import MethodParameterError, UnknownMethodError
from hf_rope_ext.methods.base import Base
from hf_rope_ext.methods.clamped import DynamicLinear, DynamicNTK, DynamicYarn
from hf_rope_ext.methods.cope import Cope
from hf_rope_ext.methods.dynamic import Dynamic
from hf_rope_ext.methods.giraffe import Giraffe
from hf_rope_ext.methods.linear import Linear
from hf_rope_ext.methods.llama3 import Llama3
from hf_rope_ext.methods.longrope import LongRope
from hf_rope_ext.methods.method import Method, Modifier
from hf_rope_ext.methods.none import NoScaling
from hf_rope_ext.methods.ntk import NTK
from hf_rope_ext.methods.ntk_by_parts import NTKByParts
from hf_rope_ext.methods.ntk_fixed import NTKFixed
from hf_rope_ext.methods.ntk_mixed import NTKMixed
from hf_rope_ext.methods.per_axis import PerAxis
from hf_rope_ext.methods.proportional import Proportional
from hf_rope_ext.methods.resonance import Resonance
from hf_rope_ext.methods.yarn import Yarn

METHODS: dict[str, type[Method]] = {
    "none": NoScaling,
    "linear": Linear,
    "ntk": NTK,
    "ntk_fixed": NTKFixed,
    "ntk_mixed": NTKMixed,
    "ntk_by_parts": NTKByParts,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "base": Base,
    "proportional": Proportional,
    "giraffe": Giraffe,
    "cope": Cope,
    "resonance": Resonance,
    "dynamic": Dynamic,
    "dynamic_ntk": DynamicNTK,
    "dynamic_linear": DynamicLinear,
    "dynamic_yarn": DynamicYarn,
}
ALIASES = {"abf": "base", "p_rope": "proportional", "pi": "linear"}

__all__ = [
    "METHODS",
    "NTK",
    "Base",
    "Cope",
    "Dynamic",
    "DynamicLinear",
    "DynamicNTK",
    "DynamicYarn",
    "Giraffe",
    "Linear",
    "Llama3",
    "LongRope",
    "Method",
    "Modifier",
    "NTKByParts",
    "NTKFixed",
    "NTKMixed",
    "NoScaling",
    "PerAxis",
    "Proportional",
    "Resonance",
    "Yarn",
    "available_methods",
    "knobs",
    "make_method",
    "make_per_axis",
    "method_from_record",
    "method_record",
    "split_name",
]


def available_methods() -> tuple[str, ...]:
    """Return the names that `make_method` takes; aliases and modifiers joined by + come on top."""
    return tuple(METHODS)


def split_name(name: object) -> tuple[type[Method], ...]:
    """Return the method classes a name stands for: one method, then modifiers in their order.

    Raises:
        UnknownMethodError: If a part is not known, or stands where it cannot.
    """
    if not isinstance(name, str):
        raise UnknownMethodError(
            f"a method is a name such as 'yarn' or a Method object, got {name!r}. "
            f"Known names: {', '.join(METHODS)}."
        )
    classes = tuple(_find(part) for part in name.split("+"))
    for cls in classes[1:]:
        if not issubclass(cls, Modifier):
            raise UnknownMethodError(
                f"{name!r}: only {_modifiers()} can follow a +, not {cls.name!r}."
            )
    return classes


def knobs(cls: type[Method]) -> tuple[str, ...]:
    """Return the names of a method's knobs."""
    return tuple(field.name for field in fields(cls) if field.name != "method")  # type: ignore[arg-type]


def make_method(name: str, **values: Any) -> Method:
    """Return the method of that name with these knobs.

    ``"yarn+resonance"`` is YaRN with `Resonance` applied after it; each knob goes to the part that
    has it.

    Raises:
        UnknownMethodError: If the name is not known.
        MethodParameterError: If a knob is missing, unknown or out of range.
    """
    classes = split_name(name)
    owned = [knob for cls in classes for knob in knobs(cls)]
    for knob in values:
        if knob not in owned:
            near = difflib.get_close_matches(knob, owned, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise MethodParameterError(
                f"{name} has no knob {knob!r}.{hint} Its knobs: {', '.join(owned) or 'none'}."
            )
    method: Method | None = None
    for cls in classes:
        own = {knob: values[knob] for knob in knobs(cls) if knob in values}
        for field in fields(cls):  # type: ignore[arg-type]
            required = field.default is MISSING and field.default_factory is MISSING
            if required and field.name not in own:
                orelse = " (or target_length)" if field.name == "factor" else ""
                raise MethodParameterError(f"{cls.name} needs {field.name}{orelse}.")
        if method is not None:
            own["method"] = method
        method = cls(**own)
    assert method is not None  # split_name returns at least one class
    return method


def make_per_axis(method: Any, values: Mapping[str, Any]) -> PerAxis:
    """Return the method that stands for values by axis, such as ``factor={"t": 4, "h": 1}``.

    Args:
        method: A name, a method object, or either by axis.
        values: Knobs: one value for all axes that have the knob, or a value by axis.

    Raises:
        UnknownMethodError: If a name is not known.
        MethodParameterError: If a knob is missing, unknown or out of range.
    """
    given = [value for value in (method, *values.values()) if isinstance(value, Mapping)]
    owners = method if isinstance(method, Mapping) else {axis: method for v in given for axis in v}
    for name, value in values.items():
        if isinstance(value, Mapping):
            missed = [axis for axis in value if axis not in owners]
            if missed:
                raise MethodParameterError(
                    f"{name} is given for axis {missed[0]!r}, which has no method; methods are "
                    f"given for {', '.join(map(repr, owners))}."
                )
        elif not any(name in _axis_knobs(one) for one in owners.values()):
            raise MethodParameterError(f"no axis has a method with the knob {name!r}.")
    return PerAxis(tuple((axis, _axis_method(one, axis, values)) for axis, one in owners.items()))


def _axis_knobs(method: Any) -> tuple[str, ...]:
    if isinstance(method, Method):
        return ()
    return tuple(knob for cls in split_name(method) for knob in knobs(cls))


def _axis_method(method: Any, axis: str, values: Mapping[str, Any]) -> Method:
    own = {name: value[axis] for name, value in values.items() if _names(value, axis)}
    if isinstance(method, Method):
        if own:
            raise MethodParameterError(
                f"{next(iter(own))} of axis {axis!r} is set on the method object already "
                f"({method!r}); pass one or the other."
            )
        return method
    shared = {
        name: value
        for name, value in values.items()
        if not isinstance(value, Mapping) and name in _axis_knobs(method)
    }
    return make_method(method, **shared, **own)


def _names(value: Any, axis: str) -> bool:
    return isinstance(value, Mapping) and axis in value


def method_record(method: Method) -> dict[str, Any]:
    """Return a method as plain JSON data, as `method_from_record` takes it."""
    if isinstance(method, PerAxis):
        by_axis = {axis: method_record(one) for axis, one in method.methods}
        return {"name": method.name, "methods": by_axis}
    own = {
        knob: list(value) if isinstance(value := getattr(method, knob), tuple) else value
        for knob in knobs(type(method))
    }
    if isinstance(method, Modifier) and not isinstance(method.method, NoScaling):
        inner = method_record(method.method)
        return {**inner, **own, "name": f"{inner['name']}+{method.name}"}
    return {"name": method.name, **own}


def method_from_record(record: Mapping[str, Any]) -> Method:
    """Return the method of a record."""
    values = dict(record)
    name = values.pop("name")
    if name != PerAxis.name:
        return make_method(name, **values)
    by_axis = values["methods"].items()
    return PerAxis(tuple((axis, method_from_record(one)) for axis, one in by_axis))


def _find(part: str) -> type[Method]:
    word = part.strip().lower().replace("-", "_")
    word = ALIASES.get(word, word)
    if word not in METHODS:
        near = difflib.get_close_matches(word, [*METHODS, *ALIASES], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownMethodError(
            f"unknown method {part!r}.{hint} Known: {', '.join(METHODS)}; "
            f"{_modifiers()} can also follow another method and a +."
        )
    return METHODS[word]


def _modifiers() -> str:
    return " and ".join(repr(name) for name, cls in METHODS.items() if issubclass(cls, Modifier))

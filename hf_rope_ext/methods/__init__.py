"""All methods, by name.

A new method is a file in this package and a line in `METHODS`; it then works on every family. A
method object can be called on a model: ``with Yarn(factor=4)(model): ...`` patches it temporarily.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from hf_rope_ext.checks import suggest
from hf_rope_ext.errors import MethodParameterError, UnknownMethodError
from hf_rope_ext.methods.alibi import Alibi
from hf_rope_ext.methods.attention_method import attention_rules, require_combination
from hf_rope_ext.methods.base import Base
from hf_rope_ext.methods.clamped import DynamicLinear, DynamicNTK, DynamicYarn
from hf_rope_ext.methods.cope import Cope
from hf_rope_ext.methods.dca import DCA
from hf_rope_ext.methods.dynamic import Dynamic
from hf_rope_ext.methods.giraffe import Giraffe
from hf_rope_ext.methods.linear import Linear
from hf_rope_ext.methods.llama3 import Llama3
from hf_rope_ext.methods.longrope import LongRope
from hf_rope_ext.methods.method import Method, Modifier
from hf_rope_ext.methods.none import NoScaling
from hf_rope_ext.methods.nope import NoPE
from hf_rope_ext.methods.ntk import NTK
from hf_rope_ext.methods.ntk_by_parts import NTKByParts
from hf_rope_ext.methods.ntk_fixed import NTKFixed
from hf_rope_ext.methods.ntk_mixed import NTKMixed
from hf_rope_ext.methods.per_axis import PerAxis
from hf_rope_ext.methods.position_maps import Piecewise, Power, Ramp
from hf_rope_ext.methods.proportional import Proportional
from hf_rope_ext.methods.rerope import LeakyReRoPE, ReRoPE
from hf_rope_ext.methods.resonance import Resonance
from hf_rope_ext.methods.score_scales import Llama4, LogN, Temperature
from hf_rope_ext.methods.self_extend import SelfExtend
from hf_rope_ext.methods.streaming import Streaming
from hf_rope_ext.methods.string import String
from hf_rope_ext.methods.xpos import XPos
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
    "nope": NoPE,
    "rerope": ReRoPE,
    "leaky_rerope": LeakyReRoPE,
    "self_extend": SelfExtend,
    "dca": DCA,
    "string": String,
    "streaming": Streaming,
    "piecewise": Piecewise,
    "power": Power,
    "ramp": Ramp,
    "alibi": Alibi,
    "xpos": XPos,
    "logn": LogN,
    "temperature": Temperature,
    "llama4": Llama4,
}
ALIASES = {"abf": "base", "p_rope": "proportional", "pi": "linear"}

__all__ = [
    "DCA",
    "METHODS",
    "NTK",
    "Alibi",
    "Base",
    "Cope",
    "Dynamic",
    "DynamicLinear",
    "DynamicNTK",
    "DynamicYarn",
    "Giraffe",
    "LeakyReRoPE",
    "Linear",
    "Llama3",
    "Llama4",
    "LogN",
    "LongRope",
    "Method",
    "Modifier",
    "NTKByParts",
    "NTKFixed",
    "NTKMixed",
    "NoPE",
    "NoScaling",
    "PerAxis",
    "Piecewise",
    "Power",
    "Proportional",
    "Ramp",
    "ReRoPE",
    "Resonance",
    "SelfExtend",
    "Streaming",
    "String",
    "Temperature",
    "XPos",
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
    """Return the names `make_method` takes, without aliases and combinations such as yarn+cope."""
    return tuple(METHODS)


def split_name(name: object) -> tuple[type[Method], ...]:
    """Return the classes a name refers to: a method, then its modifiers in order of application.

    Raises:
        UnknownMethodError: If a part is unknown, or a + is followed by anything but a modifier.
    """
    if not isinstance(name, str):
        raise UnknownMethodError(
            f"a method is a name such as 'yarn' or a Method object, got {name!r}. Known names: "
            f"{', '.join(METHODS)}."
        )
    classes = tuple(_class_named(part) for part in name.split("+"))
    for cls in classes[1:]:
        if not issubclass(cls, Modifier):
            raise UnknownMethodError(
                f"{name!r}: only {_modifiers()} can follow a +, not {cls.name!r}."
            )
    require_combination(name, classes)
    return classes


def knobs(cls: type[Method]) -> tuple[str, ...]:
    """Return the names of a method's knobs."""
    return tuple(field.name for field in fields(cls) if field.name != "method")  # type: ignore[arg-type]


def make_method(name: str, **values: Any) -> Method:
    """Make a method from its name and knobs.

    ``"yarn+resonance"`` is YaRN followed by `Resonance`; each knob goes to the part that has it.

    Raises:
        UnknownMethodError: If the name is unknown.
        MethodParameterError: If a knob is missing, unknown or out of range.
    """
    classes = split_name(name)
    known = [knob for cls in classes for knob in knobs(cls)]
    for knob in values:
        if knob not in known:
            raise MethodParameterError(
                f"{name} has no knob {knob!r}.{suggest(knob, known)} Its knobs: "
                f"{', '.join(known) or 'none'}."
            )
    method: Method | None = None
    for cls in classes:
        arguments = {knob: values[knob] for knob in knobs(cls) if knob in values}
        for field in fields(cls):  # type: ignore[arg-type]
            required = field.default is MISSING and field.default_factory is MISSING
            if required and field.name not in arguments:
                orelse = " (or target_length)" if field.name == "factor" else ""
                raise MethodParameterError(f"{cls.name} needs {field.name}{orelse}.")
        if method is not None:
            arguments["method"] = method
        method = cls(**arguments)
    assert method is not None  # split_name returns at least one class
    return method


def make_per_axis(method: Any, values: Mapping[str, Any]) -> PerAxis:
    """Make a method from values by axis, such as ``factor={"t": 4, "h": 1}``.

    Args:
        method: A name or a method object, for all axes or by axis.
        values: Knobs: one value for every axis that has the knob, or values by axis.

    Raises:
        UnknownMethodError: If a name is unknown.
        MethodParameterError: If a knob is missing, unknown or out of range.
    """
    if not isinstance(method, Mapping):
        by_axis = [value for value in values.values() if isinstance(value, Mapping)]
        method = {axis: method for value in by_axis for axis in value}
    for name, value in values.items():
        if isinstance(value, Mapping):
            unused = [axis for axis in value if axis not in method]
            if unused:
                raise MethodParameterError(
                    f"{name} is given for axis {unused[0]!r}, which has no method; methods are "
                    f"given for {', '.join(map(repr, method))}."
                )
        elif not any(name in _axis_knobs(axis_method) for axis_method in method.values()):
            raise MethodParameterError(f"no axis has a method with the knob {name!r}.")
    chosen = [(axis, _axis_method(own, axis, values)) for axis, own in method.items()]
    for axis, own in chosen:
        if attention_rules(own) is not None:
            raise MethodParameterError(
                f"{own.name!r} is given for axis {axis!r}, but an attention has one rule for all "
                f"axes; pass it for the whole model, or a frequency method by axis."
            )
    return PerAxis(tuple(chosen))


def _axis_knobs(method: Any) -> tuple[str, ...]:
    if isinstance(method, Method):
        return ()
    return tuple(knob for cls in split_name(method) for knob in knobs(cls))


def _axis_method(method: Any, axis: str, values: Mapping[str, Any]) -> Method:
    own, shared = {}, {}
    for name, value in values.items():
        if not isinstance(value, Mapping):
            shared[name] = value
        elif axis in value:
            own[name] = value[axis]
    if isinstance(method, Method):
        if own:
            raise MethodParameterError(
                f"{next(iter(own))} of axis {axis!r} is already set by the method object "
                f"{method!r}; pass one or the other."
            )
        return method
    known = _axis_knobs(method)
    return make_method(method, **{knob: shared[knob] for knob in known if knob in shared}, **own)


def method_record(method: Method) -> dict[str, Any]:
    """Return a method as JSON data that `method_from_record` reads."""
    if isinstance(method, PerAxis):
        by_axis = {axis: method_record(axis_method) for axis, axis_method in method.methods}
        return {"name": method.name, "methods": by_axis}
    values = {
        knob: list(value) if isinstance(value := getattr(method, knob), tuple) else value
        for knob in knobs(type(method))
    }
    if not isinstance(method, Modifier) or isinstance(method.method, NoScaling):
        return {"name": method.name, **values}
    inner = method_record(method.method)
    if "method" in inner or any(inner.get(knob, own) != own for knob, own in values.items()):
        # both parts have a knob of this name, with values of their own
        return {"name": method.name, **values, "method": inner}
    return {**inner, **values, "name": f"{inner['name']}+{method.name}"}


def method_from_record(record: Mapping[str, Any]) -> Method:
    """Return the method that a record describes."""
    values = dict(record)
    name = values.pop("name")
    if "method" in values:
        inner = method_from_record(values.pop("method"))
        return replace(make_method(name, **values), method=inner)  # type: ignore[type-var]
    if name != PerAxis.name:
        return make_method(name, **values)
    by_axis = values["methods"].items()
    return PerAxis(tuple((axis, method_from_record(inner)) for axis, inner in by_axis))


def _class_named(part: str) -> type[Method]:
    word = part.strip().lower().replace("-", "_")
    word = ALIASES.get(word, word)
    if word not in METHODS:
        raise UnknownMethodError(
            f"unknown method {part!r}.{suggest(word, [*METHODS, *ALIASES])} Known: "
            f"{', '.join(METHODS)}; {_modifiers()} can also follow another method and a +."
        )
    return METHODS[word]


def _modifiers() -> str:
    names = [repr(name) for name, cls in METHODS.items() if issubclass(cls, Modifier)]
    return f"{', '.join(names[:-1])} and {names[-1]}"

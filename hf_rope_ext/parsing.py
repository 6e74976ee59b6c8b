"""Parsers for lengths, sizes and methods on the command line."""

import json
import re
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.methods import Method, knobs, make_method, make_per_axis, split_name


def parse_lengths(text: str, trained: int) -> tuple[int, ...]:
    """Parse lengths in tokens: ``"1x,2x"`` as multiples of the trained length, or ``"512,1k"``.

    Args:
        text: The lengths, separated by commas.
        trained: The trained length in tokens; 0 if it is not known.

    Raises:
        RopeError: If a part is neither, or a multiple of a trained length that is not known.
    """
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([xk]?)\s*", part.lower())
        if match and match[2] == "x" and not trained:
            raise RopeError(
                f"lengths: {part!r} is a multiple of the trained length, which is not in the "
                f"config; give lengths in tokens, or original_max_position_embeddings."
            )
        scale = {"x": trained, "k": 1024, "": 1}[match[2]] if match else 0
        length = float(match[1]) * scale if match else 0.0
        if length < 1 or length != int(length):
            raise RopeError(
                f"lengths: {part!r} is neither a number of tokens (512, 128k) nor a multiple of "
                f"the trained length {trained} (2x)."
            )
        lengths.append(int(length))
    return tuple(sorted(set(lengths)))


def parse_methods(text: str, factor: float | None) -> dict[str, Method]:
    """Parse methods such as ``"none,yarn,base:rope_theta=1e6"`` into methods by label.

    Args:
        text: Comma-separated names, each with its own knobs after colons. On a model with M-RoPE a
            knob can be set for one axis: ``yarn:factor.t=4``.
        factor: Factor of the methods that take one and do not set their own.

    Raises:
        RopeError: If a name or a knob is unknown.
    """
    methods: dict[str, Method] = {}
    for part in text.split(","):
        name, *settings = part.strip().split(":")
        values = _by_axis(dict(_setting(setting, part) for setting in settings))
        takes_factor = any("factor" in knobs(cls) for cls in split_name(name))
        if factor is not None and takes_factor:
            values.setdefault("factor", factor)
        if any(isinstance(value, dict) for value in values.values()):
            methods[part.strip()] = make_per_axis(name, values)
        else:
            methods[part.strip()] = make_method(name, **values)
    return methods


def parse_size(text: str) -> tuple[int, int] | tuple[int, int, int]:
    """Parse width and height in pixels, ``"1280x720"``, or a grid of patches, ``"1x46x80"``.

    Raises:
        RopeError: If it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.strip().isdecimal() for part in parts):
        raise RopeError(
            f"{text!r} is neither WIDTHxHEIGHT in pixels (1280x720) nor TIMExROWSxCOLUMNS in "
            f"patches (1x46x80)."
        )
    return tuple(map(int, parts))  # type: ignore[return-value]


def _by_axis(settings: dict[str, Any]) -> dict[str, Any]:
    """Group settings written as ``knob.axis`` by knob."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        knob, dot, axis = name.partition(".")
        if dot:
            values.setdefault(knob, {})[axis] = value
        else:
            values[knob] = value
    return values


def split_tasks(text: str) -> tuple[str, ...]:
    """Split ``"rope_ppl:stride=64,rope_needle:depths=[0,1]"`` into one specification per task.

    Commas inside brackets belong to a list.
    """
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text))


def parse_task(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of one task from ``"rope_needle:depths=[0,1]"``.

    Raises:
        RopeError: If an option is malformed.
    """
    name, *settings = text.strip().split(":")
    return name, dict(_setting(setting, text.strip(), "tasks", "option") for setting in settings)


def _setting(text: str, part: str, what: str = "methods", kind: str = "knob") -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise RopeError(f"{what}: {part!r}: {text!r} is not {kind}=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value

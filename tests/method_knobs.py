"""Knobs for every registered method, so that a new method is tested by being registered."""

from dataclasses import MISSING, fields
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_rope_ext.methods import METHODS, make_method

# what a method needs that is neither a factor nor a list of factors
NEEDED: dict[str, dict[str, Any]] = {
    "base": {"rope_theta": 1e5},
    "giraffe": {"power": 0.5},
    "proportional": {"partial_rotary_factor": 0.5},
}


def slowdowns(pairs: int, factor: float = 4.0) -> list[float]:
    """From 1 to the factor: a list that only a method that uses it pair by pair gets right."""
    return [1 + (factor - 1) * pair / (pairs - 1) for pair in range(pairs)]


def knobs(name: str, pairs: int = 8, factor: float = 4.0) -> dict[str, Any]:
    """Valid knobs of a method on a model with that many pairs."""
    values = {"factor": factor, "long_factor": slowdowns(pairs, factor)}
    chosen = {}
    for part in name.split("+"):
        required = {field.name for field in fields(METHODS[part]) if field.default is MISSING}
        chosen |= {knob: values[knob] for knob in values if knob in required}
        chosen |= NEEDED.get(part, {})
    return chosen


# a factor is all that they need
FACTOR_ONLY = tuple(name for name in METHODS if knobs(name).keys() == {"factor"})
# each request gets the frequencies of its own length
PER_REQUEST = tuple(name for name in METHODS if make_method(name, **knobs(name)).length_dependent)
# and stock transformers has no word for it
NOT_STOCK = tuple(name for name in PER_REQUEST if name not in ROPE_INIT_FUNCTIONS)

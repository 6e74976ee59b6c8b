"""Knobs for every registered method, and what stock transformers computes from a config."""

from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_rope_ext.methods import METHODS, make_method
from hf_rope_ext.methods.attention_method import AttentionSide

# what a method needs that is neither a factor nor a list of factors
NEEDED: dict[str, dict[str, Any]] = {
    "base": {"rope_theta": 1e5},
    "giraffe": {"power": 0.5},
    "proportional": {"partial_rotary_factor": 0.5},
    "piecewise": {"slowdown": 2.0},
    "power": {"exponent": 0.5},
    "ramp": {"slope": 0.25},
}
ATTENTION_METHODS = tuple(name for name, cls in METHODS.items() if issubclass(cls, AttentionSide))
FREQUENCY_METHODS = tuple(name for name in METHODS if name not in ATTENTION_METHODS)


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
FACTOR_ONLY = tuple(name for name in FREQUENCY_METHODS if knobs(name).keys() == {"factor"})
# each request gets the frequencies of its own length
PER_REQUEST = tuple(
    name for name in FREQUENCY_METHODS if make_method(name, **knobs(name)).length_dependent
)
# and stock transformers has no word for it
NOT_STOCK = tuple(name for name in PER_REQUEST if name not in ROPE_INIT_FUNCTIONS)


def stock_plan(geometry, parameters, length):
    """Frequencies and temperature of stock transformers for a request."""
    trained = geometry.original_max_position_embeddings
    config = LlamaConfig(
        hidden_size=geometry.rotary_dim,
        num_attention_heads=1,
        max_position_embeddings=trained
        * (2 if "original_max_position_embeddings" in parameters else 1),
        rope_parameters={"rope_theta": geometry.base, **parameters},
    )
    if parameters["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)


def assert_stock_computes(method, geometry, parameters=None):
    """Assert that stock transformers plans each length from a config as a method does."""
    parameters = parameters or method.rope_parameters(geometry)
    trained = geometry.original_max_position_embeddings
    # some stock types do not compute with it, but other tools read it
    if parameters["rope_type"] not in ("default", "proportional"):
        assert parameters["factor"] == method.factor
    for length in (1, trained, trained + 1, 3 * trained):
        expected, scaling = stock_plan(geometry, parameters, length)
        plan = method.plan(geometry)
        if method.length_dependent:
            at = torch.tensor(float(length), dtype=torch.float64).reshape(1, 1, 1)
            plan = method.plan_at(geometry, at)
        found = plan.inv_freq.reshape(-1).float()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-12)
        assert float(plan.attention_scaling) == pytest.approx(scaling, rel=1e-6)

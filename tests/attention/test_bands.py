"""Attention-side methods compute what their papers define, in every layout of heads."""

import math
from functools import cache

import pytest
import torch
import transformers
from attention.brute_force import FAMILIES, Rule, expected_logits
from attention.rules import (
    LONG,
    TRUE,
    chunked,
    grouped,
    knobs,
    leaky,
    mapped,
    model_of,
    slope,
    streaming,
    temperature,
    tokens,
)
from decoding import CACHE

from hf_rope_ext import patch_model, planned, unpatch_model

RULES = {
    ("rerope", "window=20"): Rule(lambda m, n: min(m - n, 20)),
    ("rerope", ""): Rule(lambda m, n: min(m - n, 32)),
    ("leaky_rerope", "window=10 slowdown=3.5"): leaky(10, 3.5),
    # the request is mapped into 48 positions, and the window is half of the trained length
    ("leaky_rerope", ""): leaky(32, (LONG - 32) / (48 - 32)),
    ("leaky_rerope", "window=16 factor=2"): leaky(16, (128 - 16) / (48 - 16)),
    ("self_extend", "group=3 window=10"): grouped(3, 10),
    ("self_extend", ""): grouped(math.ceil((LONG - 16) / (0.6 * 64 - 16)), 16),
    ("dca", "chunk=16 limit=24"): chunked(16, 24),
    ("dca", ""): chunked(48, 64),
    ("dca+temperature", ""): chunked(48, 64, temperature),
    ("string", "shift=30 window=8"): Rule(lambda m, n: m - n if m - n < 30 else m - n - 22),
    ("string", ""): Rule(lambda m, n: m - n if m - n < 21 else m - n - 11),
    ("streaming", "sinks=3 window=12"): streaming(3, 12),
    ("streaming", ""): streaming(4, 60),
    ("piecewise", "slowdown=2.5"): mapped(lambda m: m if m <= 64 else 64 + (m - 64) / 2.5),
    ("power", "exponent=0.5"): mapped(lambda m: m if m <= 64 else m / math.sqrt(m / 64)),
    ("ramp", "slope=0.25"): mapped(lambda m: m if m <= 64 else m / (1 + 0.25 * (m - 64) / 64)),
    ("alibi", ""): Rule(lambda m, n: 0, slope=slope),
    ("xpos", "base_length=32"): Rule(lambda m, n: m - n, decay=32),
    ("logn", ""): Rule(lambda m, n: m - n, scale=lambda m: max(1, math.log(m + 1) / math.log(64))),
    ("temperature", "coefficient=0.3 factor=4"): Rule(
        lambda m, n: m - n, scale=lambda m: (0.3 * math.log(4) + 1) ** 2
    ),
    ("llama4", "scale=0.2 floor=16"): Rule(
        lambda m, n: m - n, scale=lambda m: 1 + 0.2 * math.log((m + 1) // 16 + 1)
    ),
}
# one that turns queries alone, both, keys at other places by query, and one that masks
REPRESENTATIVE = [
    ("leaky_rerope", ""),
    ("dca", "chunk=16 limit=24"),
    ("streaming", "sinks=3 window=12"),
    ("llama4", "scale=0.2 floor=16"),
]
CASES = [
    *[("llama", *name) for name in RULES],
    *[(family, *name) for family in FAMILIES if family != "llama" for name in REPRESENTATIVE],
]


@cache
def expected(family, *name):
    """Logits of a definition, or of true distances; they are computed once."""
    rule = RULES[name] if name else TRUE
    return expected_logits(model_of(family), FAMILIES[family], rule, tokens())


@pytest.fixture
def patched(request):
    """A model of a family, patched; it is shared, so the patch is taken back."""
    models = []

    def patch(family, name, **own):
        model = model_of(family)
        patch_model(model, name, **own)
        models.append(model)
        return model

    yield patch
    for model in models:
        unpatch_model(model)


@pytest.fixture(autouse=True)
def _interface(request):
    model = model_of(request.node.callspec.params["family"])
    if not model._can_set_attn_implementation():
        # GPT-J in older releases; the newest must have it in all of these
        assert tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
        pytest.skip("this release computes the family's attention without an interface")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_at_true_distances_is_the_unpatched_model(family):
    ids = tokens(length=60)
    found = expected_logits(model_of(family), FAMILIES[family], TRUE, ids)
    with torch.no_grad():
        stock = model_of(family)(input_ids=ids, use_cache=False).logits
    assert (found - stock).abs().max() < 1e-5 * stock.abs().max()


@pytest.mark.parametrize(("family", "name", "own"), CASES)
def test_logits_are_those_of_the_definition(patched, family, name, own):
    logits = expected(family, name, own)
    assert (logits - expected(family)).abs().max() > 1e-3  # the method does something here
    model = patched(family, name, **knobs(own))
    with torch.no_grad():
        found = model(input_ids=tokens(), use_cache=False).logits
    assert (found - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize(("family", "name", "own"), CASES)
def test_cached_logits_are_those_of_the_definition(patched, family, name, own):
    ids, logits = tokens(), expected(family, name, own)
    model = patched(family, name, **knobs(own))
    found, held = [], None
    with torch.no_grad(), planned(LONG):
        for start, stop in [(0, 50), (50, 77), *((n, n + 1) for n in range(77, LONG))]:
            output = model(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: held})
            held = output[CACHE]
            found.append(output.logits)
    assert (torch.cat(found, 1) - logits).abs().max() < 1e-4 * logits.abs().max()

"""Attention-side methods compute what their papers define, in every layout of heads."""

import math
from functools import cache

import pytest
import torch
import zoo
from attention.brute_force import FAMILIES, Rule, expected_logits
from zoo import TRAINED

from hf_rope_ext import patch_model, planned, unpatch_model

LONG = 90  # tokens, of which the models were trained on 64


def leaky(window, slowdown):
    return Rule(lambda m, n: m - n if m - n < window else window + (m - n - window) / slowdown)


def grouped(group, window):
    return Rule(
        lambda m, n: m - n if m - n < window else m // group - n // group + window - window // group
    )


def chunked(chunk, limit, scale=None):
    def distance(m, n):
        key = n % chunk
        if m // chunk == n // chunk:
            return m % chunk - key
        if m // chunk == n // chunk + 1:
            return min(m % chunk + chunk, limit - 1) - key
        return limit - 1 - key

    return Rule(distance, scale)


def streaming(sinks, window):
    def distance(m, n):
        if m - n < window:
            return m - n
        return min(m, sinks + window - 1) - n if n < sinks else None

    return Rule(distance)


def mapped(position):
    return Rule(lambda m, n: position(m) - position(n))


def slope(head, heads, m, n):
    assert heads == 4
    return 2.0 ** (-8 * (head + 1) / heads) * (m - n)


def temperature(m):
    return (0.1 * math.log(LONG / TRAINED) + 1) ** 2


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


def knobs(text):
    return {
        name: float(v) if "." in v else int(v) for name, v in (p.split("=") for p in text.split())
    }


@cache
def model_of(family):
    return zoo.build(family).eval()


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


def tokens(rows=2, length=LONG):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 120, (rows, length), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_at_true_distances_is_the_unpatched_model(family):
    ids = tokens(length=60)
    found = expected_logits(model_of(family), FAMILIES[family], Rule(lambda m, n: m - n), ids)
    with torch.no_grad():
        expected = model_of(family)(input_ids=ids, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("family", "name", "own"), CASES)
def test_logits_are_those_of_the_definition(patched, family, name, own):
    ids = tokens()
    expected = expected_logits(model_of(family), FAMILIES[family], RULES[name, own], ids)
    plain = expected_logits(model_of(family), FAMILIES[family], Rule(lambda m, n: m - n), ids)
    assert (expected - plain).abs().max() > 1e-3  # the method does something here
    model = patched(family, name, **knobs(own))
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("family", "name", "own"), CASES)
def test_cached_logits_are_those_of_the_definition(patched, family, name, own):
    ids = tokens()
    expected = expected_logits(model_of(family), FAMILIES[family], RULES[name, own], ids)
    model = patched(family, name, **knobs(own))
    found, held = [], None
    with torch.no_grad(), planned(LONG):
        for start, stop in [(0, 50), (50, 77), *((n, n + 1) for n in range(77, LONG))]:
            output = model(input_ids=ids[:, start:stop], cache=held, use_cache=True)
            held = output.cache
            found.append(output.logits)
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-4 * expected.abs().max()

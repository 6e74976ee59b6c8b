"""The frequencies of each method, against its paper and against stock transformers."""

import math

import numpy as np
import pytest
import torch
from conftest import TRAINED, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from method_knobs import FACTOR_ONLY, FREQUENCY_METHODS, PER_REQUEST, knobs
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_rope_ext import MethodParameterError, available_methods
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import (
    METHODS,
    NTK,
    Cope,
    Dynamic,
    DynamicYarn,
    Giraffe,
    Linear,
    Llama3,
    LongRope,
    Modifier,
    NTKByParts,
    Proportional,
    Resonance,
    Yarn,
    make_method,
)

# measured on checkpoints' configs: head_dim, rope_theta, trained length
LLAMA2 = RopeGeometry(128, 1e4, 4096)
LLAMA3 = RopeGeometry(128, 5e5, 8192)
QWEN = RopeGeometry(128, 1e6, 32768)
QWEN3 = RopeGeometry(128, 1e6, 40960)
QWEN3_VL = RopeGeometry(128, 5e6, 262144)
QWEN3_5 = RopeGeometry(64, 1e7, 262144)
GPT_OSS = RopeGeometry(64, 150000, 4096)

geometries = st.builds(
    RopeGeometry,
    rotary_dim=st.integers(2, 128).map(lambda half: 2 * half),
    base=st.floats(500.0, 1e8),
    original_max_position_embeddings=st.integers(16, 1_000_000),
)
factors = st.floats(1.0, 128.0)

# stock dynamic scaling grows with the request even at a factor of 1
IDENTITY_AT_ONE = tuple(name for name in FACTOR_ONLY if name != "dynamic")
STATIC = tuple(name for name in FACTOR_ONLY if name not in PER_REQUEST)
DYNAMIC = "dynamic_"


def lengths(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        (LLAMA2, (20, 46)),
        (LLAMA3, (18, 35)),
        (QWEN, (23, 40)),
        (QWEN3, (24, 41)),
        (QWEN3_VL, (29, 45)),
        (QWEN3_5, (14, 22)),
    ],
)
def test_yarn_ramps_between_the_published_pairs(geometry, expected):
    assert Yarn(4).correction_range(geometry) == expected


def test_yarn_without_truncation_ramps_between_fractional_pairs():
    low, high = Yarn(32, truncate=False).correction_range(GPT_OSS)

    assert (round(low, 3), round(high, 3)) == (8.093, 17.398)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(2, 1.06931), (4, 1.13863), (8, 1.20794), (16, 1.27726), (32, 1.34657)],
)
def test_yarn_temperature_is_the_published_one(factor, expected):
    assert Yarn(factor).plan(LLAMA2).attention_scaling == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(
    ("geometry", "factor", "expected"),
    [
        (LLAMA2, 4, 1.08012),
        (LLAMA2, 8, 1.11803),
        (LLAMA2, 16, 1.15470),
        (LLAMA2, 32, 1.19024),
        (QWEN, 4, 1.06458),
        (QWEN, 8, 1.09545),
    ],
)
def test_longrope_temperature_is_the_published_one(geometry, factor, expected):
    plan = LongRope(factor, [1.0] * 64).plan(geometry)

    assert plan.attention_scaling == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(
    ("factor", "expected"), [(2, 2022126.17), (4, 4088994.24), (8, 8268462.26)]
)
def test_ntk_base_is_the_published_one(factor, expected):
    parameters = NTK(factor).rope_parameters(QWEN)

    assert parameters["rope_theta"] == pytest.approx(expected, abs=5e-3)


def trained(geometry: RopeGeometry) -> np.ndarray:
    exponents = np.arange(0, geometry.rotary_dim, 2) / geometry.rotary_dim
    return geometry.base**-exponents


def by_parts(geometry: RopeGeometry, s: float, fast: float, slow: float) -> np.ndarray:
    """The index ramp, pair by pair, as its paper's code describes it."""
    d, b, length = geometry.rotary_dim, geometry.base, geometry.original_max_position_embeddings
    low, high = (
        d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(b)) for turns in (fast, slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
    result = []
    for i, theta in enumerate(trained(geometry)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(theta / s * ramp + theta * (1 - ramp))
    return np.array(result)


def llama3(geometry: RopeGeometry, s: float, low: float, high: float) -> np.ndarray:
    length, result = geometry.original_max_position_embeddings, []
    for theta in trained(geometry):
        wavelength = 2 * math.pi / theta
        if wavelength < length / high:
            result.append(theta)
        elif wavelength > length / low:
            result.append(theta / s)
        else:
            smooth = (length / wavelength - low) / (high - low)
            result.append((1 - smooth) * theta / s + smooth * theta)
    return np.array(result)


FORMULAS = {
    "none": lambda g: trained(g),
    "nope": lambda g: 0 * trained(g),
    "linear": lambda g: trained(g) / 4,
    "ntk": lambda g: np.array(
        [
            (g.base * 4 ** (g.rotary_dim / (g.rotary_dim - 2))) ** (-2 * i / g.rotary_dim)
            for i in range(g.pairs)
        ]
    ),
    "ntk_fixed": lambda g: np.array(
        [theta * 4 ** (-2 * (i + 1) / g.rotary_dim) for i, theta in enumerate(trained(g))]
    ),
    "ntk_mixed": lambda g: np.array(
        [
            theta * math.exp(-math.log(4) / (g.rotary_dim / 2) ** 0.75 * (i + 1) ** 0.75)
            for i, theta in enumerate(trained(g))
        ]
    ),
    "ntk_by_parts": lambda g: by_parts(g, 4, 32, 1),
    "yarn": lambda g: by_parts(g, 4, 32, 1),
    "llama3": lambda g: llama3(g, 4, 1, 4),
    "base": lambda g: trained(RopeGeometry(g.rotary_dim, 5e6, 1)),
    "proportional": lambda g: np.where(np.arange(g.pairs) < g.pairs // 4, trained(g), 0.0),
    "giraffe": lambda g: trained(g) * (1 - np.arange(g.pairs) / g.pairs) ** 0.5,
    "longrope": lambda g: trained(g) / 4,
}
# where a formula is written for other knobs than those of `method_knobs`
FORMULA_KNOBS = {
    "base": {"rope_theta": 5e6},
    "proportional": {"partial_rotary_factor": 0.25},
    "longrope": {"factor": 4, "long_factor": [4.0] * 64, "short_factor": [4.0] * 64},
}
# cope and resonance have tests of their own
MODIFIERS = {name for name in FREQUENCY_METHODS if issubclass(METHODS[name], Modifier)}


def test_every_method_has_a_formula_or_is_one_of_them_at_each_length():
    assert set(FREQUENCY_METHODS) - set(FORMULAS) == MODIFIERS | set(PER_REQUEST) - {"longrope"}


@pytest.mark.parametrize("position", [4096, 32768, 131072, 1_000_000])
@pytest.mark.parametrize("name", FORMULAS)
def test_angles_are_exact_in_float64_at_long_positions(name, position):
    method = make_method(name, **FORMULA_KNOBS.get(name, knobs(name)))

    angles = method.plan(QWEN).inv_freq * position

    # 1e-6 radians at a million positions: nothing is lost before the final float32
    np.testing.assert_allclose(angles.numpy(), FORMULAS[name](QWEN) * position, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "rope"),
    [
        (Linear(4), {"rope_type": "linear", "factor": 4.0}),
        (Yarn(4), {"rope_type": "yarn", "factor": 4.0}),
        (
            Yarn(40, mscale=1.0, mscale_all_dim=0.707),
            {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        ),
        (
            Yarn(4, beta_fast=8, beta_slow=2, truncate=False, attention_factor=1.5),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "truncate": False,
                "attention_factor": 1.5,
            },
        ),
        (
            Llama3(4),
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": TRAINED,
            },
        ),
        (
            Proportional(partial_rotary_factor=0.5),
            {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        ),
        (
            LongRope(4, [2.0] * 8, [1.5] * 8),
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "long_factor": [2.0] * 8,
                "short_factor": [1.5] * 8,
                "original_max_position_embeddings": TRAINED,
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_plan_is_what_transformers_computes(method, rope):
    config = tiny_llama().config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    config.max_position_embeddings = TRAINED
    stock, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")

    plan = method.plan(RopeGeometry(16, 10000.0, TRAINED, 16))

    torch.testing.assert_close(plan.inv_freq.float(), stock, rtol=2e-6, atol=0)
    assert plan.attention_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("length", [64, 65, 100, 256, 1000])
def test_dynamic_is_what_transformers_computes_at_every_length(length):
    config = tiny_llama().config
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    stock, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)

    plan = Dynamic(4).plan_at(RopeGeometry(16, 10000.0, TRAINED), lengths(length))

    torch.testing.assert_close(plan.inv_freq[0, 0].float(), stock, rtol=2e-6, atol=0)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_dynamic_stretches_by_the_known_multiplier_at_its_target(factor):
    plan = Dynamic(factor).plan_at(LLAMA2, lengths(factor * 4096))

    multiplier = float(LLAMA2.inv_freq()[-1] / plan.inv_freq[0, 0, -1])

    assert multiplier == pytest.approx(factor**2 - factor + 1, rel=1e-12)


@pytest.mark.parametrize(
    "inner", [name.removeprefix(DYNAMIC) for name in METHODS if name.startswith(DYNAMIC)]
)
def test_the_papers_dynamic_scale_is_the_request_over_the_trained_length_within_one_and_factor(
    inner,
):
    dynamic = make_method(f"{DYNAMIC}{inner}", factor=4)

    plan = dynamic.plan_at(LLAMA2, lengths(100, 4096, 6144, 16384, 1e6))

    for row, scale in enumerate([1.0, 1.0, 1.5, 4.0, 4.0]):
        static = make_method(inner, factor=scale).plan(LLAMA2)
        torch.testing.assert_close(plan.inv_freq[row, 0], static.inv_freq, rtol=1e-14, atol=0)
        if inner == "yarn":
            assert plan.attention_scaling[row].item() == pytest.approx(static.attention_scaling)


@pytest.mark.parametrize("name", PER_REQUEST)
@pytest.mark.parametrize("length", [1000, 4096, 4097, 9000, 50_000])
def test_a_frozen_method_is_the_static_method_of_that_length(name, length):
    method = make_method(name, **knobs(name, LLAMA2.pairs))
    frozen = method.freeze(LLAMA2, length)
    at_length = method.plan_at(LLAMA2, lengths(length))

    assert not frozen.length_dependent
    torch.testing.assert_close(
        frozen.plan(LLAMA2).inv_freq, at_length.inv_freq[0, 0], rtol=1e-14, atol=0
    )
    assert float(frozen.plan(LLAMA2).attention_scaling) == pytest.approx(
        float(torch.as_tensor(at_length.attention_scaling).flatten()[0])
    )


def test_longrope_switches_strictly_beyond_the_trained_length():
    method = LongRope(4, long_factor=[4.0] * 64, short_factor=[2.0] * 64)

    slowdown = LLAMA2.inv_freq() / method.plan_at(LLAMA2, lengths(4096, 4097)).inv_freq[:, 0]

    assert slowdown[0].tolist() == [2.0] * 64
    assert slowdown[1].tolist() == [4.0] * 64


def test_the_rotation_ramp_is_llama3_scaling():
    ramp = NTKByParts(8, beta_fast=4, beta_slow=1, ramp="rotation").plan(LLAMA3)

    np.testing.assert_allclose(ramp.inv_freq.numpy(), llama3(LLAMA3, 8, 1, 4), rtol=1e-14)


def test_index_and_rotation_ramps_differ_by_the_known_factor():
    index = NTKByParts(4).plan(QWEN).inv_freq
    rotation = NTKByParts(4, ramp="rotation").plan(QWEN).inv_freq

    assert float((index / rotation).max()) == pytest.approx(1.71, abs=0.01)


def test_the_harmonic_blend_mixes_wavelengths():
    arithmetic = NTKByParts(4)
    harmonic = NTKByParts(4, blend="harmonic").plan(QWEN).inv_freq
    share = arithmetic.slowed_share(QWEN)

    expected = 1 / ((1 - share) / QWEN.inv_freq() + share * 4 / QWEN.inv_freq())

    torch.testing.assert_close(harmonic, expected, rtol=1e-14, atol=0)
    assert float((harmonic / arithmetic.plan(QWEN).inv_freq).min()) == pytest.approx(0.64, abs=0.01)


def test_resonance_makes_fitting_wavelengths_whole_and_leaves_the_others():
    plan = Resonance(Yarn(4)).plan(LLAMA2)
    plain = Yarn(4).plan(LLAMA2)

    wavelengths = 2 * math.pi / plan.inv_freq
    fits = 2 * math.pi / plain.inv_freq <= 4096

    assert 0 < fits.sum() < 64
    torch.testing.assert_close(wavelengths[fits], wavelengths[fits].round(), rtol=1e-12, atol=0)
    assert torch.equal(plan.inv_freq[~fits], plain.inv_freq[~fits])
    assert plan.attention_scaling == plain.attention_scaling


def test_cope_fades_the_slowest_pairs_with_a_cosine():
    gain = Cope(clipped_pairs=20).plan(LLAMA2).inv_freq / LLAMA2.inv_freq()

    expected = [1.0] * 44 + [(1 + math.cos(math.pi * k / 19)) / 2 for k in range(20)]
    np.testing.assert_allclose(gain.numpy(), expected, rtol=0, atol=1e-15)


def test_cope_takes_the_papers_share_of_the_pairs_and_can_clip_hard():
    clipped = Cope(hard_clip=True).plan(RopeGeometry(64, 1e4, 4096)).inv_freq

    assert (clipped == 0).tolist() == [False] * 22 + [True] * 10


@pytest.mark.parametrize("inner", [Dynamic(4), DynamicYarn(4), Yarn(4), Linear(2)])
@pytest.mark.parametrize("cls", [Cope, Resonance])
def test_a_modifier_applies_its_rule_to_whatever_the_method_plans(cls, inner):
    method, at = cls(inner), 9000
    expected = cls(inner.freeze(LLAMA2, at)).plan(LLAMA2)

    assert method.target_length(LLAMA2) == inner.target_length(LLAMA2)
    assert method.length_dependent == inner.length_dependent
    assert method.freeze(LLAMA2, at) == cls(inner.freeze(LLAMA2, at))
    if inner.length_dependent:
        # within the trained length nothing is modified but by the plan of a row
        assert torch.equal(method.plan(LLAMA2).inv_freq, LLAMA2.inv_freq())
        rows = method.plan_at(LLAMA2, lengths(100, at))
        torch.testing.assert_close(rows.inv_freq[1, 0], expected.inv_freq, rtol=1e-13, atol=0)
        assert float(torch.as_tensor(rows.attention_scaling).flatten()[-1]) == pytest.approx(
            float(expected.attention_scaling)
        )
    else:
        assert torch.equal(method.plan(LLAMA2).inv_freq, expected.inv_freq)
        assert method.plan(LLAMA2).attention_scaling == inner.plan(LLAMA2).attention_scaling
        assert not torch.equal(expected.inv_freq, inner.plan(LLAMA2).inv_freq)


def test_giraffe_truncates_as_its_code_does():
    plan = Giraffe(truncated_length=512).plan(LLAMA2)
    cut = 2 * math.pi / 512

    expected = [
        theta if theta >= cut else cut / 16 if theta >= cut / 8 else 0.0
        for theta in trained(LLAMA2)
    ]
    np.testing.assert_allclose(plan.inv_freq.numpy(), expected, rtol=1e-14)


def test_resting_pairs_of_the_trained_model_keep_resting():
    geometry = RopeGeometry(64, 1e6, 4096, 64, rotated_pairs=8)

    for name in FREQUENCY_METHODS:
        method = make_method(name, **knobs(name, geometry.pairs))
        assert not method.plan(geometry).inv_freq[8:].any()


@given(geometries, st.sampled_from(IDENTITY_AT_ONE))
@settings(deadline=None)
def test_factor_one_is_the_identity_at_every_length(geometry, name):
    method = make_method(name, factor=1)
    plans = [method.plan(geometry)]
    if method.length_dependent:
        plans.append(method.plan_at(geometry, lengths(1, 10_000_000)))

    for plan in plans:
        inv_freq = plan.inv_freq.reshape(-1, geometry.pairs)
        torch.testing.assert_close(inv_freq[-1], geometry.inv_freq(), rtol=1e-12, atol=0)
        assert torch.as_tensor(plan.attention_scaling).eq(1.0).all()


@given(geometries, factors, st.sampled_from(STATIC))
@settings(deadline=None)
def test_the_slowdown_grows_from_fast_to_slow_pairs_and_stays_within_the_factor(
    geometry, factor, name
):
    slowdown = geometry.inv_freq() / make_method(name, factor=factor).plan(geometry).inv_freq

    assert slowdown.isfinite().all()
    assert (slowdown >= 1 - 1e-9).all()
    assert (slowdown <= factor * (1 + 1e-9)).all()
    assert (slowdown.diff() >= -1e-9 * factor).all()


@pytest.mark.parametrize("name", ["ntk", "ntk_by_parts", "yarn", "llama3"])
def test_the_fastest_pair_is_kept_and_the_slowest_is_slowed_by_the_whole_factor(name):
    slowdown = LLAMA2.inv_freq() / make_method(name, factor=8).plan(LLAMA2).inv_freq

    assert slowdown[0] == pytest.approx(1.0, rel=1e-12)
    assert slowdown[-1] == pytest.approx(8.0, rel=1e-12)


@given(geometries, factors, st.floats(0.1, 3.0), st.floats(0.05, 1.0))
@settings(deadline=None)
def test_every_method_is_finite_on_every_geometry(geometry, factor, power, share):
    own = {
        "base": {"rope_theta": 1e6 * factor},
        "cope": {"hard_clip": True},
        "giraffe": {"factor": factor, "power": power, "truncated_length": 100.0},
        "proportional": {"partial_rotary_factor": share},
    }
    for name in available_methods():
        method = make_method(name, **own.get(name, knobs(name, geometry.pairs, factor)))
        plans = [method.plan(geometry)]
        if method.length_dependent:
            plans.append(method.plan_at(geometry, lengths(1.0, 1e3, 1e7)))
        for plan in plans:
            assert plan.inv_freq.isfinite().all()
            assert (plan.inv_freq >= 0).all()
            assert torch.as_tensor(plan.attention_scaling).isfinite().all()


def test_lists_of_the_wrong_length_are_refused_when_the_model_is_known():
    with pytest.raises(MethodParameterError, match="each of the model's 64 pairs, got 3"):
        LongRope(4, [1.0, 2.0, 3.0]).plan(LLAMA2)
    with pytest.raises(MethodParameterError, match="at most the model's 8 pairs, got 9"):
        Cope(clipped_pairs=9).plan(RopeGeometry(16, 1e4, 64))

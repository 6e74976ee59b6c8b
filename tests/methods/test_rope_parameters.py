"""What a method writes into a config is what stock transformers computes from it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_knobs import assert_stock_computes

from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import (
    NTK,
    Base,
    Dynamic,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NoScaling,
    NTKByParts,
    Proportional,
    Yarn,
)

# lengths and bases at which the ramp of YaRN starts below the first pair, ends beyond the last
# one, or is empty
geometries = st.builds(
    RopeGeometry,
    rotary_dim=st.integers(2, 64).map(lambda half: 2 * half),
    base=st.sampled_from([50.0, 500.0, 1e4, 5e5, 1e7]),
    original_max_position_embeddings=st.sampled_from([16, 64, 100, 1000, 8192, 32768, 262144]),
)
factors = st.sampled_from([1.0, 1.5, 2.0, 4.0, 32.0])
betas = st.sampled_from([(32.0, 1.0), (8.0, 2.0), (1.0, 1.0), (64.0, 0.25)])
temperatures = st.sampled_from(
    [{}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.2}]
)


@given(geometries, factors, betas, st.booleans(), temperatures)
@settings(deadline=None, derandomize=True, max_examples=80)
def test_yarn_is_that_of_transformers_on_every_geometry(geometry, factor, beta, truncate, own):
    fast, slow = beta
    shape = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    method = Yarn(factor, **shape, **own)
    written = method.rope_parameters(geometry)

    if written is not None:
        assert_stock_computes(method, geometry, written)
    # what stock computes does not hang on how the numbers are written
    trained = geometry.original_max_position_embeddings
    length = {"original_max_position_embeddings": trained}
    said = {"rope_type": "yarn", "factor": factor, **length, **shape, **own}
    if factor > 1:
        assert_stock_computes(method, geometry, said)


@given(geometries, factors, betas, st.booleans())
@settings(deadline=None, derandomize=True, max_examples=25)
def test_ntk_by_parts_is_yarn_without_its_temperature(geometry, factor, beta, truncate):
    fast, slow = beta
    method = NTKByParts(factor, beta_fast=fast, beta_slow=slow, truncate=truncate)
    written = method.rope_parameters(geometry)
    trained = geometry.original_max_position_embeddings

    exact = round(factor * trained) / trained == factor
    assert (written is not None) == (exact or factor == 1)
    if written is not None:
        assert written["rope_type"] == ("yarn" if factor > 1 else "default")
        assert_stock_computes(method, geometry, written)


@given(geometries, factors, st.sampled_from([(1.0, 4.0), (0.5, 8.0)]))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_llama3_is_that_of_transformers(geometry, factor, frequencies):
    low, high = frequencies

    assert_stock_computes(Llama3(factor, low, high), geometry)
    ramp = NTKByParts(factor, beta_fast=high, beta_slow=low, ramp="rotation")
    assert_stock_computes(ramp, geometry)
    assert ramp.rope_parameters(geometry)["rope_type"] == ("llama3" if factor > 1 else "default")


@given(geometries, factors)
@settings(deadline=None, derandomize=True, max_examples=25)
def test_the_other_types_are_those_of_transformers(geometry, factor):
    pairs = geometry.pairs
    rising = [1 + pair * factor / pairs for pair in range(pairs)]
    methods = [
        NoScaling(),
        Linear(factor),
        Base(geometry.base * 3),
        Dynamic(factor),
        LongRope(factor, rising),
        LongRope(factor, rising, [0.5 + one for one in rising], attention_factor=1.7),
        LongRope(factor, rising).freeze(geometry, geometry.original_max_position_embeddings + 1),
        LongRope(factor, rising).freeze(geometry, geometry.original_max_position_embeddings),
        Proportional(partial_rotary_factor=0.5),
    ]
    if pairs > 1:
        methods.append(NTK(factor))
    for method in methods:
        assert_stock_computes(method, geometry)


@pytest.mark.parametrize(
    "method",
    [
        Yarn(4, blend="harmonic"),
        Yarn(4, ramp="rotation"),
        NTKByParts(4, blend="harmonic"),
        NTKByParts(4, blend="harmonic", ramp="rotation"),
        Yarn(1.0001),
        NTKByParts(math.e),
        Proportional(factor=2.0, partial_rotary_factor=0.5),
        DynamicYarn(4),
    ],
    ids=repr,
)
def test_what_transformers_has_no_type_for_is_not_written(method):
    assert method.rope_parameters(RopeGeometry(64, 1e4, 4096)) is None


def test_a_type_that_rotates_the_whole_head_is_not_written_where_part_of_it_rotates():
    method = Proportional(partial_rotary_factor=0.5)

    assert method.rope_parameters(RopeGeometry(32, 1e4, 4096, head_dim=64)) is None
    assert method.rope_parameters(RopeGeometry(64, 1e4, 4096, head_dim=64)) is not None


def test_a_head_of_one_pair_has_no_larger_base():
    assert NTK(4).rope_parameters(RopeGeometry(2, 1e4, 64)) is None


@pytest.mark.parametrize("method", [Yarn, NTKByParts])
def test_a_temperature_of_its_own_is_written_at_a_factor_of_one(method):
    geometry = RopeGeometry(64, 1e4, 4096)

    assert method(1).rope_parameters(geometry) == {"rope_type": "default"}
    if method is Yarn:
        assert Yarn(1, attention_factor=1.5).rope_parameters(geometry)["attention_factor"] == 1.5


@given(geometries, factors, temperatures)
@settings(deadline=None, derandomize=True, max_examples=20)
def test_the_softmax_scale_of_yarn_is_the_square_of_its_second_magnitude(geometry, factor, own):
    plan = Yarn(factor, **own, temperature_coefficient=0.2).plan(geometry)

    weight = own.get("mscale_all_dim")
    expected = 1.0 if weight is None else (weight * 0.2 * math.log(factor) + 1) ** 2
    assert plan.softmax_scaling == pytest.approx(expected)

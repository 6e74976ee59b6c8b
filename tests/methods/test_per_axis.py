"""A method for each axis, without a model."""

import pytest
import torch

from hf_rope_ext import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import (
    Base,
    DynamicYarn,
    Linear,
    NoScaling,
    PerAxis,
    Yarn,
    make_per_axis,
    method_from_record,
    method_record,
)

AXES = ("t", "h", "w", "t", "h", "w", "t", "h")
GEOMETRY = RopeGeometry(16, 1e4, 64, axes=AXES)
ROWS = torch.tensor([10.0, 64.0, 200.0], dtype=torch.float64).reshape(-1, 1, 1)


def of(axis):
    return torch.tensor([name == axis for name in AXES])


@pytest.mark.parametrize("order", ["thw", "wht"])
def test_each_pair_has_the_frequency_of_its_own_axis(order):
    methods = {"t": Linear(2), "h": Linear(8), "w": Base(5e5)}
    joined = PerAxis({axis: methods[axis] for axis in order}).plan(GEOMETRY)

    for axis, method in methods.items():
        expected = method.plan(GEOMETRY).inv_freq
        assert torch.equal(joined.inv_freq[of(axis)], expected[of(axis)])


@pytest.mark.parametrize("axis", "thw")
def test_an_axis_that_is_not_named_keeps_its_frequencies(axis):
    joined = PerAxis({axis: Linear(4)}).plan(GEOMETRY)

    slowdown = GEOMETRY.inv_freq() / joined.inv_freq
    torch.testing.assert_close(slowdown, torch.where(of(axis), 4.0, 1.0).double())


@pytest.mark.parametrize("axis", "thw")
@pytest.mark.parametrize("other", [Yarn(2), NoScaling(), Yarn(16), DynamicYarn(16)])
def test_a_row_has_the_frequencies_of_its_length_and_the_largest_temperature(axis, other):
    rest = {name: other for name in "thw" if name != axis}
    method = PerAxis({axis: DynamicYarn(4), **rest})
    joined = method.plan_at(GEOMETRY, ROWS)

    assert method.length_dependent
    for row, length in enumerate(ROWS.flatten().tolist()):
        own = DynamicYarn(4).freeze(GEOMETRY, length).plan(GEOMETRY)
        others = other.freeze(GEOMETRY, length).plan(GEOMETRY)
        expected = torch.where(of(axis), own.inv_freq, others.inv_freq)
        torch.testing.assert_close(joined.inv_freq[row, 0], expected, rtol=1e-13, atol=0)
        assert torch.as_tensor(joined.attention_scaling)[row].item() == pytest.approx(
            max(own.attention_scaling, others.attention_scaling)
        )
        frozen = method.freeze(GEOMETRY, length)
        assert not frozen.length_dependent
        torch.testing.assert_close(frozen.plan(GEOMETRY).inv_freq, expected, rtol=1e-13, atol=0)


def test_the_largest_softmax_scale_counts():
    scaled = Yarn(4, mscale=1.0, mscale_all_dim=1.0)

    assert scaled.plan(GEOMETRY).softmax_scaling > 1
    for axis in "thw":
        joined = PerAxis({axis: scaled}).plan(GEOMETRY)
        assert joined.softmax_scaling == scaled.plan(GEOMETRY).softmax_scaling


def test_the_target_is_the_longest_of_any_axis():
    assert PerAxis({"t": Linear(2), "h": Linear(4), "w": Base(1e5)}).target_length(GEOMETRY) == 256
    assert PerAxis({"t": Base(1e5)}).target_length(GEOMETRY) is None


def test_one_method_for_all_axes_is_that_method():
    same = PerAxis({axis: Yarn(4) for axis in "thw"})

    assert same.for_axes(GEOMETRY) == Yarn(4)
    assert PerAxis({"t": NoScaling()}).for_axes(GEOMETRY) == NoScaling()
    for axes in ("t", "th"):
        some = PerAxis({axis: Yarn(4) for axis in axes})
        assert some.for_axes(GEOMETRY) is some


def test_what_is_no_method_of_an_axis_is_refused():
    inner = PerAxis({"t": Linear(2)})
    for wrong in (inner, "yarn", None):
        with pytest.raises(MethodParameterError, match="axis 'h' must be a method of one axis"):
            PerAxis({"h": wrong})
    with pytest.raises(MethodParameterError, match="at least one axis"):
        PerAxis({})
    with pytest.raises(MethodParameterError, match=r"no axis 'x'; .* turn by 't', 'h', 'w'"):
        PerAxis({"x": Linear(2)}).for_axes(GEOMETRY)
    for ask in (inner.plan, inner.for_axes):
        with pytest.raises(MethodParameterError, match=r"by axis \('t'\) are for"):
            ask(RopeGeometry(16, 1e4, 64))


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        ("linear", {"factor": {"t": 4, "h": 2}}, {"t": Linear(4), "h": Linear(2)}),
        ({"t": "yarn", "h": "linear"}, {"factor": 4}, {"t": Yarn(4), "h": Linear(4)}),
        (
            {"t": "yarn", "h": "linear"},
            {"factor": 4, "beta_fast": 16},
            {"t": Yarn(4, beta_fast=16), "h": Linear(4)},
        ),
        (
            {"t": "yarn", "h": "yarn"},
            {"factor": {"t": 4, "h": 2}, "truncate": False, "beta_slow": {"h": 2}},
            {"t": Yarn(4, truncate=False), "h": Yarn(2, beta_slow=2, truncate=False)},
        ),
        ({"t": Linear(2), "h": "linear"}, {"factor": 4}, {"t": Linear(2), "h": Linear(4)}),
        ({"t": "none", "h": Yarn(2)}, {}, {"t": NoScaling(), "h": Yarn(2)}),
    ],
)
def test_values_reach_the_axes_whose_methods_have_the_knob(method, values, expected):
    made = make_per_axis(method, values)

    assert dict(made.methods) == expected
    assert method_from_record(method_record(made)) == made


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ({"t": "yarn"}, {"factor": {"t": 4, "w": 2}}, "axis 'w', which has no method; .* for 't'"),
        ({"t": "none", "h": Yarn(2)}, {"factor": 4}, "no axis has a method with the knob 'factor'"),
        ({"t": Yarn(2)}, {"factor": {"t": 4}}, "factor of axis 't' is already set"),
    ],
)
def test_values_that_reach_no_axis_are_refused(method, values, message):
    with pytest.raises(MethodParameterError, match=message):
        make_per_axis(method, values)

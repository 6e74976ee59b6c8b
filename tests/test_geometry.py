"""What is known of a trained model, by itself."""

import math

import pytest
import torch

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry


def test_frequencies_fall_from_one_and_resting_pairs_are_zero():
    geometry = RopeGeometry(8, 16.0, 100, rotated_pairs=3)

    assert geometry.index().tolist() == [0, 1, 2, 3]
    assert geometry.exponents().tolist() == [0, 0.25, 0.5, 0.75]
    assert geometry.inv_freq().tolist() == [1, 0.5, 0.25, 0]
    turns = [100 / (2 * math.pi * 2**pair) for pair in range(3)]
    assert geometry.rotations().tolist() == pytest.approx([*turns, 0])
    assert geometry.inv_freq().dtype == torch.float64


@pytest.mark.parametrize(("width", "pairs"), [(1, 1), (2, 1), (7, 4), (8, 4)])
def test_an_odd_width_is_rounded_up(width, pairs):
    assert RopeGeometry(width, 10.0, 1).pairs == len(RopeGeometry(width, 10.0, 1).inv_freq())
    assert RopeGeometry(width, 10.0, 1).pairs == pairs


def test_tensors_are_on_the_device_asked_for():
    geometry = RopeGeometry(8, 16.0, 100, device=torch.device("meta"))

    for tensor in (geometry.index(), geometry.exponents(), geometry.inv_freq()):
        assert tensor.device.type == "meta"


def test_what_is_not_told_has_no_effect():
    geometry = RopeGeometry(8, 16.0, 100)

    assert (geometry.head_dim, geometry.rotated_pairs, geometry.device, geometry.axes) == (
        None, None, None, None
    )  # fmt: skip
    assert geometry == RopeGeometry(8, 16.0, 100, None, None, None, None)
    assert geometry != RopeGeometry(8, 16.0, 101)
    # one name for each pair would bury the rest of a message
    assert "axes" not in repr(RopeGeometry(8, 16.0, 100, axes=("t",) * 4))


def test_a_plan_scales_no_attention_unless_it_says_so():
    plan = FrequencyPlan(torch.ones(1))

    assert (plan.attention_scaling, plan.softmax_scaling) == (1.0, 1.0)

"""Methods by name, with their knobs, and their records."""

import math

import pytest
import torch
from conftest import tiny_llama
from method_knobs import knobs

from hf_rope_ext import MethodParameterError, UnknownMethodError, methods, patched
from hf_rope_ext.methods import (
    METHODS,
    Cope,
    Dynamic,
    DynamicYarn,
    Linear,
    LongRope,
    NTKFixed,
    NTKMixed,
    Proportional,
    Resonance,
    Yarn,
    make_method,
    method_record,
)


def test_names_are_forgiving_about_case_hyphens_and_aliases():
    assert make_method("PI", factor=2) == Linear(2)
    assert make_method("p-rope", partial_rotary_factor=0.5) == Proportional(
        partial_rotary_factor=0.5
    )
    assert make_method("Dynamic-YaRN", factor=2) == DynamicYarn(2)
    assert make_method("abf", rope_theta=1e6).name == "base"


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UnknownMethodError, match=r"'yarm'.*Did you mean 'yarn'\?.*linear"):
        make_method("yarm", factor=2)


@pytest.mark.parametrize("name", [None, 4, ["yarn"]])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(UnknownMethodError, match="a method is a name"):
        make_method(name)


def test_modifiers_compose_and_take_their_own_knobs():
    method = make_method("yarn+cope+resonance", factor=4, clipped_pairs=8)

    assert method == Resonance(Cope(Yarn(4), clipped_pairs=8))


def test_only_modifiers_follow_a_plus():
    with pytest.raises(UnknownMethodError, match=r"only 'cope', .* and 'llama4' can follow"):
        make_method("yarn+linear", factor=4)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("yarn", {"factor": 0.5}, "factor must be a finite number at least 1, got 0.5"),
        ("yarn", {"factor": "4"}, "factor must be a finite number at least 1, got '4'"),
        ("yarn", {"factor": True}, "got True"),
        ("yarn", {"factor": math.nan}, "got nan"),
        ("yarn", {"factor": math.inf}, "got inf"),
        ("yarn", {}, r"yarn needs factor \(or target_length\)"),
        ("yarn", {"factor": 4, "beta_quick": 3}, "no knob 'beta_quick'.*Did you mean"),
        ("yarn", {"factor": 4, "attn_factor": 1.0}, "Did you mean 'attention_factor'"),
        ("yarn", {"factor": 4, "beta_fast": 1, "beta_slow": 2}, "beta_fast must be greater"),
        ("yarn", {"factor": 4, "beta_slow": 0}, "beta_slow must be .* greater than 0"),
        ("yarn", {"factor": 4, "mscale": 1.0}, "mscale and mscale_all_dim only work together"),
        ("yarn", {"factor": 4, "ramp": "log"}, "ramp must be one of 'index', 'rotation'"),
        ("yarn", {"factor": 4, "blend": "geometric"}, "blend must be one of"),
        ("llama3", {"factor": 4, "low_freq_factor": 4}, "high_freq_factor must be greater"),
        ("linear", {"factor": 4, "beta_fast": 32}, "linear has no knob 'beta_fast'"),
        ("none", {"factor": 4}, "none has no knob 'factor'"),
        ("base", {"rope_theta": 1}, "rope_theta must be a finite number greater than 1"),
        ("proportional", {"partial_rotary_factor": 1.5}, "greater than 0 and at most 1, got 1.5"),
        ("giraffe", {}, "give power, truncated_length, or both"),
        ("longrope", {"factor": 4, "long_factor": "4"}, "long_factor must be a list"),
        (
            "longrope",
            {"factor": 4, "long_factor": [1, 0]},
            r"long_factor\[1\] must be a finite number greater than 0, got 0",
        ),
        ("longrope", {"factor": 4, "long_factor": []}, "long_factor must be a list"),
        ("cope", {"clipped_pairs": 1}, "at least 2, got 1"),
        ("cope", {"hard_clip": 1}, "hard_clip must be True or False, got 1"),
        ("yarn", {"factor": 4, "truncate": "no"}, "truncate must be True or False, got 'no'"),
        ("ntk_mixed", {"factor": 2, "exponent": 0}, "exponent must be"),
    ],
)
def test_bad_knobs_name_the_knob_the_value_and_what_is_allowed(name, values, message):
    with pytest.raises(MethodParameterError, match=message):
        make_method(name, **values)


TINY = torch.finfo(torch.float32).tiny
BELOW_ONE, ABOVE_ONE = math.nextafter(1, 0), math.nextafter(1, 2)
PAIR = {"mscale": 0.5, "mscale_all_dim": 0.5}
# of each knob that is a number: its method and what goes with it, the last values allowed, and the
# first that are not
BOUNDS = {
    **{
        f"{name}:factor": (name, knobs(name), [1, ABOVE_ONE], [BELOW_ONE])
        for name in METHODS
        if "factor" in methods.knobs(METHODS[name])
    },
    "ntk_by_parts:beta_fast": ("ntk_by_parts", {"factor": 2, "beta_slow": TINY}, [TINY], [0, -1]),
    "yarn:beta_slow": ("yarn", {"factor": 2}, [TINY, 32], [0, 33]),
    "yarn:temperature_coefficient": ("yarn", {"factor": 2}, [0, 0.5], [-TINY]),
    "yarn:attention_factor": ("yarn", {"factor": 2}, [TINY, 0.5, None], [0]),
    "yarn:mscale": ("yarn", {"factor": 2, **PAIR}, [TINY, 0.5], [0, None]),
    "yarn:mscale_all_dim": ("yarn", {"factor": 2, **PAIR}, [TINY, 0.5], [0, None]),
    "longrope:attention_factor": ("longrope", knobs("longrope"), [TINY, 0.5, None], [0]),
    "llama3:low_freq_factor": ("llama3", {"factor": 2}, [TINY, 3.9], [0, 4]),
    "llama3:high_freq_factor": ("llama3", {"factor": 2}, [ABOVE_ONE], [1]),
    "base:rope_theta": ("base", {}, [ABOVE_ONE], [1]),
    "proportional:partial_rotary_factor": ("proportional", {}, [TINY, 1], [0, ABOVE_ONE]),
    "giraffe:power": ("giraffe", {"truncated_length": 9}, [0, 0.5], [-TINY]),
    "giraffe:truncated_length": ("giraffe", {"power": 1}, [TINY, 0.5, None], [0]),
    "ntk_mixed:exponent": ("ntk_mixed", {"factor": 2}, [TINY], [0]),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_a_knob_is_allowed_up_to_its_bound_and_kept_as_a_float(case):
    name, others, allowed, refused = BOUNDS[case]
    knob = case.partition(":")[2]
    for value in allowed:
        made = getattr(make_method(name, **{**others, knob: value}), knob)
        assert made == value
        assert value is None or type(made) is float
    for value in (*refused, math.nan, True):
        with pytest.raises(MethodParameterError, match=knob):
            make_method(name, **{**others, knob: value})


def test_equal_betas_are_a_step_by_index_and_none_by_rotations():
    assert make_method("yarn", factor=2, beta_fast=2, beta_slow=2).beta_fast == 2
    with pytest.raises(MethodParameterError, match="beta_fast must be greater"):
        make_method("yarn", factor=2, beta_fast=2, beta_slow=2, ramp="rotation")


def test_clipped_pairs_are_at_least_two_or_one_that_is_clipped_hard():
    assert Cope(clipped_pairs=2).clipped_pairs == 2
    assert Cope(clipped_pairs=1, hard_clip=True).clipped_pairs == 1
    for wrong in ({"clipped_pairs": 1}, {"clipped_pairs": 0, "hard_clip": True}):
        with pytest.raises(MethodParameterError, match="cope: clipped_pairs must be an integer"):
            Cope(**wrong)


@pytest.mark.parametrize("name", ["longrope", "yarn", "llama3", "giraffe"])
def test_a_message_begins_with_the_method(name):
    with pytest.raises(MethodParameterError, match=f"^{name}: factor must be"):
        make_method(name, **{**knobs(name), "factor": 0})


@pytest.mark.parametrize(
    "method",
    [
        Yarn(4, beta_fast=16, truncate=False),
        LongRope(4, [2.0] * 8),
        Resonance(Cope(Dynamic(2))),
        NTKFixed(2),
        NTKMixed(2, exponent=0.625),
        Proportional(partial_rotary_factor=0.5),
        *(make_method(name, **knobs(name)) for name in METHODS),
    ],
    ids=lambda method: method.name,
)
def test_a_record_makes_the_same_method_again(method):
    record = method_record(method)

    assert make_method(record.pop("name"), **record) == method


def test_the_registry_names_every_method_by_its_own_name():
    assert [cls.name for cls in METHODS.values()] == list(METHODS)


@pytest.mark.parametrize("method", [Yarn(4), Resonance(Cope(Linear(2)))], ids=lambda it: it.name)
def test_calling_a_method_patches_a_model_for_a_block(method):
    model = tiny_llama()
    tokens = torch.arange(1, 100)[None]
    with torch.no_grad():
        stock = model(tokens).logits
        with patched(model, method, temperature="logits"):
            expected = model(tokens).logits

        with method(model, temperature="logits") as extended:
            found = extended(tokens).logits

        assert torch.equal(found, expected)
        assert not torch.equal(found, stock)
        assert torch.equal(model(tokens).logits, stock)


def test_every_method_is_importable_by_its_class_name():
    for cls in (*METHODS.values(), methods.Method, methods.Modifier, methods.PerAxis):
        assert getattr(methods, cls.__name__) is cls
        assert cls.__name__ in methods.__all__

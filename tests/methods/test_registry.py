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
    with pytest.raises(UnknownMethodError, match="only 'cope' and 'resonance' can follow"):
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

"""Checks of arguments, exactly at their bounds, and what they say."""

import math
import re

import pytest

from hf_rope_ext import MethodParameterError, RopeError
from hf_rope_ext.checks import (
    require_bool,
    require_choice,
    require_integer,
    require_number,
    suggest,
)

BELOW, ABOVE = math.nextafter(2.0, 0.0), math.nextafter(2.0, 3.0)


def refusal(check, *arguments, **bounds):
    with pytest.raises(RopeError) as caught:
        check("it", *arguments, **bounds)
    return str(caught.value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        ({"least": 2}, [2, 2.0, ABOVE], [BELOW, -2], "at least 2"),
        ({"above": 2}, [ABOVE], [2, BELOW], "greater than 2"),
        ({"most": 2}, [2, BELOW, -9], [ABOVE], "at most 2"),
        ({"below": 2}, [BELOW], [2, ABOVE], "less than 2"),
        ({"least": 1, "below": 2}, [1, BELOW], [2, 0.5], "at least 1 and less than 2"),
    ],
)
def test_a_number_is_within_its_bounds(bounds, inside, outside, said):
    for value in inside:
        require_number("it", value, **bounds)
    for value in (*outside, math.nan, math.inf, -math.inf, "2", True, None):
        message = refusal(require_number, value, **bounds)
        assert message == f"it must be a finite number {said}, got {value!r}."


def test_a_number_without_bounds_is_finite():
    require_number("it", -1e300)
    assert refusal(require_number, math.inf) == "it must be a finite number, got inf."


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        ((2,), [2, 3, 10**9], [1, -2], "of at least 2"),
        ((2, 4), [2, 3, 4], [1, 5], "from 2 to 4"),
        ((2, None), [2], [1], "of at least 2"),
    ],
)
def test_an_integer_is_within_its_bounds(bounds, inside, outside, said):
    for value in inside:
        require_integer("it", value, *bounds)
    for value in (*outside, 2.0, True, "2", None):
        assert refusal(require_integer, value, *bounds) == (
            f"it must be an integer {said}, got {value!r}."
        )
        assert f"{said}, in rows, got" in refusal(require_integer, value, *bounds, unit="rows")


def test_a_choice_is_of_the_same_type():
    require_choice("it", 1, (1, None))
    require_choice("it", None, iter((1, None)))
    for wrong in (True, 1.0, "1"):
        message = refusal(require_choice, wrong, (1, None))
        assert message == f"it must be one of 1, None, got {wrong!r}."


def test_a_switch_is_true_or_false():
    require_bool("it", False)
    assert refusal(require_bool, 1) == "it must be True or False, got 1."


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (require_number, ("x",)),
        (require_integer, ("x", 1)),
        (require_choice, ("x", (1,))),
        (require_bool, ("x",)),
    ],
)
def test_the_caller_chooses_the_error(check, arguments):
    with pytest.raises(MethodParameterError, match=re.escape("got 'x'")):
        check("it", *arguments, error=MethodParameterError)


def test_only_a_near_word_is_suggested():
    assert suggest("yran", iter(["linear", "yarn"])) == " Did you mean 'yarn'?"
    assert suggest("banana", ["linear", "yarn"]) == ""
    assert suggest("ntk_by_prts", ["ntk", "ntk_by_parts", "ntk_fixed"]).endswith("by_parts'?")
    assert suggest("yarn", ["yearning"], cutoff=0.9) == ""

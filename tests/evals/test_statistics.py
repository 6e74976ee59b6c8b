"""Summaries of results, and every threshold exactly where it lies."""

import pytest

from hf_rope_ext.evals.statistics import (
    RULER_THRESHOLD,
    base_score,
    by_place,
    effective_length,
    k_max,
    longest_run,
    own_effective_length,
    summary,
    weighted_averages,
    wilson,
)

UNSORTED = {400: 0.25, 100: 1.0, 200: 0.5}


@pytest.mark.parametrize(
    ("rule", "at", "counts"),
    [
        (effective_length, RULER_THRESHOLD, False),
        (effective_length, 0.857, True),
        (k_max, 0.2, True),
        (k_max, 0.1999, False),
        (lambda scores: own_effective_length(scores, 0.4), 0.34, True),
        (lambda scores: own_effective_length(scores, 0.4), 0.3399, False),
        (lambda scores: longest_run(scores, 0.7), 0.7, True),
    ],
)
def test_a_threshold_is_met_or_exceeded(rule, at, counts):
    assert rule({64: at}) == (64 if counts else None)


def test_lengths_count_in_order_however_they_are_given():
    assert longest_run(UNSORTED, 0.5) == 200
    assert longest_run(UNSORTED, 0.2) == 400
    assert weighted_averages(UNSORTED) == pytest.approx(
        ((1 * 1.0 + 2 * 0.5 + 3 * 0.25) / 6, (3 * 1.0 + 2 * 0.5 + 1 * 0.25) / 6)
    )


@pytest.mark.parametrize(
    ("trained", "expected"), [(99, 1.0), (100, 1.0), (200, 1.0), (400, 1.0), (50, 1.0)]
)
def test_the_base_score_is_the_best_within_the_trained_length(trained, expected):
    assert base_score(UNSORTED, trained) == expected
    rising = {400: 0.9, 100: 0.1, 200: 0.5}
    within = [score for length, score in rising.items() if length <= trained]
    assert base_score(rising, trained) == (max(within) if within else 0.1)


def test_there_is_no_own_length_without_a_base_score():
    assert own_effective_length({64: 0.0}, 0.0) is None
    assert own_effective_length({64: 0.0}, -1.0) is None
    assert own_effective_length({64: 0.01}, 0.01) == 64


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_an_interval_widens_with_confidence_and_narrows_with_count(confidence):
    low, high = wilson(0.3, 20, confidence)
    inner, outer = wilson(0.3, 200, confidence), wilson(0.3, 20, confidence + 0.04)

    assert outer[0] < low < inner[0] < 0.3 < inner[1] < high < outer[1]
    assert wilson(0.3, 20, confidence) == pytest.approx(
        tuple(1 - end for end in reversed(wilson(0.7, 20, confidence)))
    )


def test_an_interval_holds_its_share_and_is_that_of_95_percent():
    for count in range(1, 60):
        for hits in range(count + 1):
            low, high = wilson(hits / count, count)
            assert -1e-15 < low <= hits / count <= high < 1 + 1e-15
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)


def test_a_summary_is_means_count_and_interval():
    results = [
        {"score": 1.0, "tries": 2.0},
        {"score": 0.0, "tries": 4.0},
        {"score": 1.0, "tries": 0},
    ]
    low, high = wilson(2 / 3, 3)

    assert summary(results) == pytest.approx(
        {"score": 2 / 3, "tries": 2.0, "n": 3, "low": low, "high": high}
    )


def test_parts_are_summaries_of_each_depth_and_group():
    places = [(0.0, "a"), (0.0, "b"), (0.5, "a"), (0.0, "a")]
    results = [{"score": score} for score in (1.0, 0.0, 1.0, 0.0)]
    found = by_place(places, results)

    assert {name: found[name] for name in found if name != "parts"} == summary(results)
    assert found["parts"] == [
        {"depth": 0.0, "group": "a", **summary([results[0], results[3]])},
        {"depth": 0.0, "group": "b", **summary([results[1]])},
        {"depth": 0.5, "group": "a", **summary([results[2]])},
    ]


def test_a_single_part_is_not_told_twice():
    results = [{"score": 1.0}, {"score": 0.0}]

    assert by_place([(None, None)] * 2, results) == {**summary(results), "parts": []}


@pytest.mark.parametrize("count", range(1, 60))
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_interval_stays_within_nothing_and_everything(share, count):
    low, high = wilson(share, count)
    assert 0.0 <= low <= share <= high <= 1.0

"""What a report says of its cells, written out by hand."""

import pytest

from hf_rope_ext.evals.report import Report
from hf_rope_ext.evals.statistics import (
    base_score,
    by_place,
    k_max,
    own_effective_length,
    summary,
    weighted_averages,
    wilson,
)
from hf_rope_ext.evals.writing import make_table


def report(cells, metrics, methods=("none", "yarn"), trained=64, missing=()):
    """A report from ``{(method, task, length): number or cell}``."""
    rows = []
    for (method, task, length), value in cells.items():
        cell = value if isinstance(value, dict) else {metrics[task]: value}
        rows.append({"method": method, "task": task, "length": length, **cell})
    settings = {
        "model": {"trained_length": trained},
        "methods": {method: {"name": method} for method in methods},
        "tasks": metrics,
    }
    lacking = [dict(zip(("method", "task", "length"), cell, strict=True)) for cell in missing]
    return Report(settings, {}, rows, lacking)


def perplexities(**by_method):
    cells = {
        (method, "rope_ppl", length): value
        for method, values in by_method.items()
        for length, value in values.items()
    }
    return report(cells, {"rope_ppl": "perplexity"}, tuple(by_method))


def test_a_cost_is_taken_at_the_longest_trained_length_that_both_have():
    found = perplexities(
        none={16: 10.0, 32: 8.0, 64: 5.0, 128: 50.0},
        yarn={16: 11.0, 32: 9.0, 64: 6.0, 128: 7.0},
        linear={16: 12.0, 32: 10.0, 128: 9.0},
        base={128: 4.0},
    ).summary()["rope_ppl"]

    assert found["none"]["change"] == 0.0
    assert found["yarn"]["change"] == pytest.approx(6 / 5 - 1)
    assert found["linear"]["change"] == pytest.approx(10 / 8 - 1)
    assert found["base"]["change"] is None


def test_without_the_unpatched_model_a_method_is_compared_with_itself():
    scores = {16: 0.4, 64: 0.8, 128: 0.7, 256: 0.67}
    cells = {("yarn", "rope_kv", length): score for length, score in scores.items()}

    found = report(cells, {"rope_kv": "score"}, ("yarn",)).summary()["rope_kv"]["yarn"]

    # 85 % of 0.8 is 0.68, which the shortest length already misses
    assert found == {"effective_length": None, "own_effective_length": None, "k_max": 256}
    assert perplexities(yarn={64: 6.0, 128: 7.0}).summary()["rope_ppl"]["yarn"]["change"] == 0.0


def test_a_method_without_cells_has_no_summary():
    found = report(
        {("none", "rope_kv", 64): 1.0},
        {"rope_kv": "score", "rope_add": "score"},
        missing=[("yarn", "rope_kv", 64), ("none", "rope_add", 128)],
    )

    assert found.summary().keys() == {"rope_kv"}
    assert found.summary()["rope_kv"].keys() == {"none"}
    assert found.lengths("rope_add") == [128]
    assert found.value("yarn", "rope_kv", 64) is None
    assert found.shown("yarn", "rope_kv", 64) == "-"


def test_the_ruler_mean_covers_the_lengths_that_every_task_has():
    scores = {
        "rope_ruler_vt": {16: 1.0, 32: 0.9, 64: 0.2},
        "rope_ruler_cwe": {16: 0.8, 32: 0.5},
        "rope_kv": {16: 0.0, 32: 0.0},
    }
    cells = {
        ("yarn", task, length): score
        for task, values in scores.items()
        for length, score in values.items()
    }

    found = report(cells, dict.fromkeys(scores, "score"), ("yarn",)).summary()["rope_ruler"]["yarn"]

    assert found["mean"] == {"16": pytest.approx(0.9), "32": pytest.approx(0.7)}
    assert found["average_rising"] == pytest.approx((1 * 0.9 + 2 * 0.7) / 3)
    assert found["average_falling"] == pytest.approx((2 * 0.9 + 1 * 0.7) / 3)
    assert found["effective_length"] == 16
    assert found["own_effective_length"] == 16
    assert found["k_max"] == 32


def test_one_ruler_task_is_no_mean_and_tasks_without_a_common_length_have_none():
    alone = report({("yarn", "rope_ruler_vt", 64): 1.0}, {"rope_ruler_vt": "score"}, ("yarn",))
    apart = report(
        {("yarn", "rope_ruler_vt", 64): 1.0, ("yarn", "rope_ruler_cwe", 32): 1.0},
        {"rope_ruler_vt": "score", "rope_ruler_cwe": "score"},
        ("yarn",),
    )

    assert "rope_ruler" not in alone.summary()
    assert apart.summary()["rope_ruler"] == {"yarn": {}}


def test_depths_are_those_of_the_task_in_order_and_a_part_is_of_its_own_cell():
    def cell(*parts):
        return {
            "score": 0.5,
            "parts": [{"depth": depth, "score": score, "n": 1} for depth, score in parts],
        }

    found = report(
        {
            ("none", "rope_kv", 64): cell((1.0, 0.1), (0.0, 0.2)),
            ("yarn", "rope_kv", 64): cell((0.5, 0.3), (0.0, 0.4)),
            ("none", "rope_kv", 128): cell((0.0, 0.6)),
            ("none", "rope_add", 64): cell((0.25, 0.7)),
            ("yarn", "rope_add", 64): cell((None, 0.8)),
        },
        {"rope_kv": "score", "rope_add": "score"},
    )

    assert found.depths("rope_kv") == [0.0, 0.5, 1.0]
    assert found.depths("rope_add") == [0.25]
    assert found.at_depth("none", "rope_kv", 64, 0.0)["score"] == 0.2
    assert found.at_depth("yarn", "rope_kv", 64, 0.0)["score"] == 0.4
    assert found.at_depth("none", "rope_kv", 128, 0.0)["score"] == 0.6
    assert found.at_depth("yarn", "rope_kv", 64, 1.0) is None
    assert found.at_depth("yarn", "rope_kv", 128, 0.0) is None


def test_a_table_has_a_row_for_each_method_and_says_how_far_a_score_reads():
    scores = {("none", 64): 0.951, ("none", 128): 0.1, ("yarn", 64): 0.9, ("yarn", 128): 0.85}
    cells = {(method, "rope_kv", n): score for (method, n), score in scores.items()}
    cells |= {("yarn", "rope_ppl", 64): 12.3456}
    found = report(cells, {"rope_kv": "score", "rope_ppl": "perplexity"})

    def rows(task):
        columns = [list(column.cells) for column in make_table(found, task).columns]
        return list(zip(*columns, strict=True))

    assert rows("rope_kv") == [("none", "95%", "10%", "64"), ("yarn", "90%", "85%", "128")]
    assert rows("rope_ppl") == [("none", "-"), ("yarn", "12.35")]
    headings = [str(column.header) for column in make_table(found, "rope_kv").columns]
    assert headings == ["method", "64 (1x)", "128 (2x)", "reads up to"]


def test_titles_say_what_is_better_and_name_options():
    metrics = {
        "rope_kv:depths=[1]:samples=2": "score",
        "rope_ppl": "perplexity",
        "passkey": "exact",
    }
    found = report({}, metrics)

    assert [found.title(task) for task in metrics] == [
        "rope_kv: score (higher is better), depths=[1], samples=2",
        "rope_ppl: perplexity (lower is better)",
        "pass keys retrieved (higher is better)",
    ]


def test_scores_count_in_order_of_length_whatever_the_order_they_come_in():
    backwards = {8: 0.1, 4: 0.9, 2: 0.5, 1: 0.7}

    assert k_max(backwards) == 4
    assert own_effective_length(backwards, 0.5) == 4
    assert weighted_averages(backwards) == weighted_averages(dict(sorted(backwards.items())))
    assert base_score({1: 0.5, 2: 1.0, 4: 2.0}, trained=2) == 1.0


def test_a_threshold_that_is_just_reached_counts():
    assert k_max({1: 0.2}) == 1
    assert own_effective_length({1: 1.0, 2: 0.85, 4: 0.8499}, 1.0) == 2


def test_the_summary_of_results_has_every_mean_and_the_interval_of_the_score():
    results = [{"score": 1.0, "nll": 2.0}, {"score": 0.0, "nll": 4.0}, {"score": 0.0, "nll": 0.0}]

    found = summary(results)

    low, high = wilson(1 / 3, 3)
    assert found == {"score": 1 / 3, "nll": 2.0, "n": 3, "low": low, "high": high}


def test_parts_are_the_results_of_each_place_and_one_place_is_none():
    results = [{"score": 1.0}, {"score": 0.0}, {"score": 1.0}, {"score": 1.0}]
    places = [(0.0, "a"), (0.0, "b"), (1.0, "a"), (0.0, "b")]

    found = by_place(places, results)

    assert found["score"] == 0.75
    assert [
        (part["depth"], part["group"], part["score"], part["n"]) for part in found["parts"]
    ] == [
        (0.0, "a", 1.0, 1),
        (0.0, "b", 0.5, 2),
        (1.0, "a", 1.0, 1),
    ]
    assert len(by_place([(0.5, None), *[(1.0, None)] * 3], results)["parts"]) == 2
    assert by_place([(0.5, None)] * 4, results)["parts"] == []
    with pytest.raises(ValueError, match="zip"):
        by_place(places[:3], results)

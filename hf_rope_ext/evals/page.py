"""Render a report as a self-contained HTML page; needs jinja2."""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_rope_ext.evals.report import Report

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 300, 58, 38, 14, 16
NOTHING = {"text": "-", "level": None, "hint": "not measured"}
WORST_RATIO = 4.0
"""Perplexities this many times the best one in the table get the palest color."""


def render(report: Report) -> str:
    """Return the page as HTML."""
    sections = [_section(report, task) for task in report.tasks]
    page: str = _template().render(
        report=report,
        sections=sections,
        summary=report.summary(),
        settings=json.dumps(report.settings, indent=2),
        environment=report.environment,
    )
    return page


@cache
def _template() -> Any:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    source = files("hf_rope_ext.evals").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _section(report: Report, task: str) -> dict[str, Any]:
    lengths = report.lengths(task)
    values = [v for m in report.methods for v in report.scores(m, task).values()]
    best = min(values, default=1.0)
    rows = [[_cell(report, method, task, n, best) for n in lengths] for method in report.methods]
    maps = [
        {
            "method": method,
            "rows": [
                {"depth": depth, "cells": [_spot(report, method, task, n, depth) for n in lengths]}
                for depth in report.depths(task)
            ],
        }
        for method in report.methods
    ]
    return {
        "task": task,
        "title": report.title(task),
        "is_score": report.is_score(task),
        "lengths": lengths,
        "edge": sum(length <= report.trained for length in lengths),
        "rows": list(zip(report.methods, rows, strict=True)),
        "maps": maps if report.depths(task) else [],
        "chart": _chart(report, task) if values and len(lengths) > 1 else None,
    }


def _cell(report: Report, method: str, task: str, length: int, best: float) -> dict[str, Any]:
    value, cell = report.value(method, task, length), report.cell(method, task, length)
    if value is None or cell is None:
        return NOTHING
    if report.is_score(task):
        hint = (
            f"{value:.1%}, 95 % interval {cell['low']:.0%} to {cell['high']:.0%}, n = {cell['n']}"
        )
        return {"text": f"{value:.0%}", "level": value, "hint": hint}
    ratio = math.log(max(value / best, 1.0)) / math.log(WORST_RATIO)
    hint = f"{value:.6g} over {cell['tokens']} tokens"
    return {"text": f"{value:.4g}", "level": max(1.0 - ratio, 0.0), "hint": hint}


def _spot(report: Report, method: str, task: str, length: int, depth: float) -> dict[str, Any]:
    part = report.at_depth(method, task, length, depth)
    if part is None:
        return NOTHING
    hint = f"{length} tokens, depth {depth:.0%}: {part['score']:.0%} of {part['n']}"
    return {"level": part["score"], "hint": hint, "text": f"{100 * part['score']:.0f}"}


def _chart(report: Report, task: str) -> dict[str, Any]:
    """Return the lines of a chart over log length, in SVG coordinates."""
    lengths = report.lengths(task)
    score = report.is_score(task)
    values = [v for m in report.methods for v in report.scores(m, task).values()]
    low, high = (0.0, 1.0) if score else (math.log(min(values)), math.log(max(values)))
    high = high if high > low else low + 1.0

    def x(length: float) -> float:
        first, last = math.log(lengths[0]), math.log(lengths[-1])
        share = (math.log(length) - first) / (last - first)
        return round(LEFT + 20 + share * (WIDTH - LEFT - RIGHT - 40), 1)

    def y(value: float) -> float:
        share = ((value if score else math.log(value)) - low) / (high - low)
        return round(HEIGHT - BOTTOM - 8 - share * (HEIGHT - BOTTOM - TOP - 16), 1)

    lines = []
    for number, method in enumerate(report.methods):
        scores = report.scores(method, task)
        points = [
            {"x": x(n), "y": y(v), "hint": f"{method} at {n}: {report.shown(method, task, n)}"}
            for n, v in scores.items()
        ]
        lines.append({"method": method, "color": number % 8, "points": points})
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if score else _marks(math.exp(low), math.exp(high))
    return {
        "lines": lines,
        "x": [{"at": x(length), "text": _short(length)} for length in lengths],
        "y": [{"at": y(v), "text": f"{v:.0%}" if score else f"{v:g}"} for v in marks],
        "trained": x(report.trained) if lengths[0] <= report.trained <= lengths[-1] else None,
        "box": (WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT),
    }


def _marks(low: float, high: float) -> list[float]:
    """Return round numbers in a range, for a logarithmic axis."""
    candidates = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in (1, 1.5, 2, 3, 5, 7)
    ]
    inside = [mark for mark in candidates if low <= mark <= high]
    if len(inside) < 2:
        return [float(f"{low:.3g}"), float(f"{high:.3g}")]
    return inside[:: max(len(inside) // 6, 1)]


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)

"""The results of a comparison as data: scores, depths, summaries."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals import statistics

SCHEMA_VERSION = 2

TITLES = {
    "perplexity": "perplexity of the same tokens (lower is better)",
    "passkey": "pass keys retrieved (higher is better)",
    "rope_short": "perplexity at ordinary length (lower is better)",
}


@dataclass(frozen=True)
class Report:
    """The results of a comparison, with everything they depend on.

    Args:
        settings: Settings of the comparison, from `Comparison.settings`.
        environment: Versions and device.
        cells: One entry per method, task and length.
        missing: Cells that were not finished in time.
    """

    settings: dict[str, Any]
    environment: dict[str, str]
    cells: list[dict[str, Any]]
    missing: list[dict[str, Any]] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """The model's trained length; 0 if it is not known."""
        return int(self.settings["model"]["trained_length"])

    @property
    def methods(self) -> list[str]:
        """Labels of the methods."""
        return list(self.settings["methods"])

    @property
    def tasks(self) -> list[str]:
        """Labels of the tasks."""
        return list(self.settings["tasks"])

    def is_score(self, task: str) -> bool:
        """Return whether a task's metric is a score (higher is better), not a perplexity."""
        return self.settings["tasks"][task] in ("score", "exact")

    def title(self, task: str) -> str:
        """Return a human-readable title of a task."""
        name, _, options = task.partition(":")
        better = (
            "score (higher is better)" if self.is_score(task) else "perplexity (lower is better)"
        )
        title = TITLES.get(name, f"{name}: {better}")
        return f"{title}, {options.replace(':', ', ')}" if options else title

    def multiple(self, length: int) -> str:
        """Return a length as a multiple of the trained one, such as ``2x``; empty if unknown."""
        return f"{length / self.trained:g}x" if self.trained else ""

    def lengths(self, task: str) -> list[int]:
        """Return the lengths that a task is measured at, ascending."""
        cells = (*self.cells, *self.missing)
        return sorted({int(cell["length"]) for cell in cells if cell["task"] == task})

    def cell(self, method: str, task: str, length: int) -> dict[str, Any] | None:
        """Return one cell; None if it is not finished."""
        key = (method, task, length)
        for cell in self.cells:
            if (cell["method"], cell["task"], cell["length"]) == key:
                return cell
        return None

    def value(self, method: str, task: str, length: int) -> float | None:
        """Return a cell's metric; None if there is none."""
        cell = self.cell(method, task, length)
        value = None if cell is None else cell[self.settings["tasks"][task]]
        return None if value is None else float(value)

    def scores(self, method: str, task: str) -> dict[int, float]:
        """Return a method's metric by length, for the finished cells."""
        values = {length: self.value(method, task, length) for length in self.lengths(task)}
        return {length: value for length, value in values.items() if value is not None}

    def shown(self, method: str, task: str, length: int) -> str:
        """Return a cell's metric as text."""
        value = self.value(method, task, length)
        if value is None:
            return "-"
        return f"{value:.0%}" if self.is_score(task) else f"{value:.4g}"

    def depths(self, task: str) -> list[float]:
        """Return the depths of a task, ascending."""
        parts = (p for c in self.cells if c["task"] == task for p in c.get("parts", []))
        return sorted({part["depth"] for part in parts if part["depth"] is not None})

    def at_depth(self, method: str, task: str, length: int, depth: float) -> dict[str, Any] | None:
        """Return a cell's results at one depth; None if it is not finished."""
        cell = self.cell(method, task, length)
        parts = cell.get("parts", []) if cell else []
        return next((part for part in parts if part["depth"] == depth), None)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return the usable context of each method, by task.

        ``effective_length`` uses RULER's absolute threshold of 85.6 %; ``own_effective_length``
        uses 85 % of the unpatched model's best score within its trained length (or the method's
        own, if the unpatched model is not measured); ``k_max`` uses Position Interpolation's 20 %.
        ``rope_ruler`` is the mean of the RULER tasks, with RULER's linearly weighted averages.
        Perplexities have ``change``, relative to the unpatched model within the trained length.
        """
        summary: dict[str, dict[str, Any]] = {}
        plain = next((label for label in self.methods if self._is_plain(label)), None)
        for task in self.tasks:
            for method in self.methods:
                scores = self.scores(method, task)
                if not scores:
                    continue
                base = self.scores(plain, task) if plain else {}
                summarize = self._reach if self.is_score(task) else self._cost
                summary.setdefault(task, {})[method] = summarize(scores, base or scores)
        ruler = [task for task in self.tasks if task.startswith("rope_ruler_")]
        if len(ruler) > 1:
            summary["rope_ruler"] = {method: self._ruler(method, ruler) for method in self.methods}
        return summary

    def _is_plain(self, label: str) -> bool:
        return bool(self.settings["methods"][label]["name"] == "none")

    def _reach(self, scores: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
        reference = statistics.base_score(base, self.trained)
        return {
            "effective_length": statistics.effective_length(scores),
            "own_effective_length": statistics.own_effective_length(scores, reference),
            "k_max": statistics.k_max(scores),
        }

    def _cost(self, scores: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
        shared = [length for length in scores if length <= self.trained and length in base]
        if not shared:
            return {"change": None}
        return {"change": scores[max(shared)] / base[max(shared)] - 1}

    def _ruler(self, method: str, tasks: list[str]) -> dict[str, Any]:
        scores = [self.scores(method, task) for task in tasks]
        lengths = set.intersection(*map(set, scores))
        if not lengths:
            return {}
        mean = {n: sum(by_length[n] for by_length in scores) / len(scores) for n in lengths}
        rising, falling = statistics.weighted_averages(mean)
        ordered = {str(length): mean[length] for length in sorted(mean)}
        reach = self._reach(mean, mean)
        return {"mean": ordered, "average_rising": rising, "average_falling": falling, **reach}


def load_report(directory: Path) -> Report:
    """Return a saved report.

    Raises:
        RopeError: If there is none, or its schema version differs.
    """
    path = directory / "report.json"
    try:
        content: Mapping[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RopeError(f"cannot read a report from {str(path)!r}: {error}") from error
    if content.get("settings", {}).get("schema_version") != SCHEMA_VERSION:
        raise RopeError(f"{str(path)!r} is not a report of schema version {SCHEMA_VERSION}.")
    return Report(**{name: content[name] for name in Report.__dataclass_fields__})

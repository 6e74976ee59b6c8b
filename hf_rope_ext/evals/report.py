"""What a comparison found: tables, JSON, CSV, plots and a page."""

import csv
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals import statistics

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 2

TITLES = {
    "perplexity": "perplexity of the same tokens (lower is better)",
    "passkey": "pass keys retrieved (higher is better)",
    "rope_short": "perplexity at ordinary length (lower is better)",
}


@dataclass(frozen=True)
class Report:
    """The numbers of a comparison and all they depend on.

    Args:
        settings: Model, methods, tasks, lengths, text and seed.
        environment: Versions and machine.
        cells: One entry for each method, task and length.
        missing: Cells that were not reached in time.
    """

    settings: dict[str, Any]
    environment: dict[str, str]
    cells: list[dict[str, Any]]
    missing: list[dict[str, Any]] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """The model's trained length."""
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
        """Return whether a task's number is a share, higher being better, not a perplexity."""
        return self.settings["tasks"][task] in ("score", "exact")

    def title(self, task: str) -> str:
        """Return a task's name in words."""
        name, _, options = task.partition(":")
        better = (
            "score (higher is better)" if self.is_score(task) else "perplexity (lower is better)"
        )
        title = TITLES.get(name, f"{name}: {better}")
        return f"{title}, {options.replace(':', ', ')}" if options else title

    def lengths(self, task: str) -> list[int]:
        """Return the lengths a task is measured at."""
        every = (*self.cells, *self.missing)
        return sorted({int(cell["length"]) for cell in every if cell["task"] == task})

    def cell(self, method: str, task: str, length: int) -> dict[str, Any] | None:
        """Return one cell; None if it is not finished."""
        key = (method, task, length)
        for cell in self.cells:
            if (cell["method"], cell["task"], cell["length"]) == key:
                return cell
        return None

    def value(self, method: str, task: str, length: int) -> float | None:
        """Return the number that tables and plots show of one cell; None if there is none."""
        cell = self.cell(method, task, length)
        found = None if cell is None else cell[self.settings["tasks"][task]]
        return None if found is None else float(found)

    def scores(self, method: str, task: str) -> dict[int, float]:
        """Return the numbers of one method by length."""
        found = {length: self.value(method, task, length) for length in self.lengths(task)}
        return {length: value for length, value in found.items() if value is not None}

    def shown(self, method: str, task: str, length: int) -> str:
        """Return one cell as text."""
        value = self.value(method, task, length)
        if value is None:
            return "-"
        return f"{value:.0%}" if self.is_score(task) else f"{value:.4g}"

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return, for each task and method, how far its context works.

        ``effective_length`` has RULER's absolute bar of 85.6 %, ``own_effective_length`` 85 % of
        the unpatched model's own score within its trained length (of the method's own where the
        unpatched model is not measured), ``k_max`` Position Interpolation's 20 %. ``rope_ruler``
        is the mean of the RULER tasks, with its averages of linear weights. Perplexities have
        their change against the unpatched model within the trained length.
        """
        found: dict[str, dict[str, Any]] = {}
        plain = next((label for label in self.methods if self._is_plain(label)), None)
        for task in self.tasks:
            for method in self.methods:
                scores = self.scores(method, task)
                if not scores:
                    continue
                base = self.scores(plain, task) if plain else {}
                how = self._reach if self.is_score(task) else self._cost
                found.setdefault(task, {})[method] = how(scores, base or scores)
        ruler = [task for task in self.tasks if task.startswith("rope_ruler_")]
        if len(ruler) > 1:
            found["rope_ruler"] = {method: self._ruler(method, ruler) for method in self.methods}
        return found

    def table(self, task: str) -> "Table":
        """Return methods by lengths."""
        from rich.table import Table

        table = Table(title=self.title(task), title_justify="left")
        table.add_column("method")
        for length in self.lengths(task):
            table.add_column(f"{length} ({length / self.trained:g}x)", justify="right")
        reach = self.summary().get(task, {})
        if self.is_score(task):
            table.add_column("reads up to", justify="right")
        for method in self.methods:
            shown = [self.shown(method, task, length) for length in self.lengths(task)]
            if self.is_score(task):
                shown.append(str(reach.get(method, {}).get("own_effective_length") or "-"))
            table.add_row(method, *shown)
        return table

    def save(self, directory: Path) -> list[Path]:
        """Write ``report.json``, ``cells.csv``, and what the installed packages allow.

        That is ``report.html`` with jinja2, and a plot per task, with a heat map where it has
        depths, with matplotlib.

        Returns:
            The files written.

        Raises:
            RopeError: If they cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return self._save(directory)
        except OSError as error:
            raise RopeError(
                f"cannot write the report to {str(directory)!r}: {error.strerror or error}."
            ) from error

    def _save(self, directory: Path) -> list[Path]:
        report, cells = directory / "report.json", directory / "cells.csv"
        report.write_text(json.dumps({**asdict(self), "summary": self.summary()}, indent=2) + "\n")
        rows = list(self._rows())
        columns = dict.fromkeys(key for row in rows for key in row)
        with cells.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)
        return [report, cells, *self._plots(directory), *self._page(directory)]

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield flat rows: each cell, then its depths, groups or position buckets."""
        for cell in self.cells:
            lists = {key: value for key, value in cell.items() if isinstance(value, list)}
            yield {key: value for key, value in cell.items() if key not in lists}
            where = {key: cell[key] for key in ("method", "task", "length")}
            for parts in lists.values():
                yield from ({**where, **part} for part in parts)

    def _plots(self, directory: Path) -> list[Path]:
        try:
            from hf_rope_ext.evals.plots import plot_by_depth, plot_by_length
        except ImportError:
            return []
        paths = []
        for task in self.tasks:
            name = re.sub(r"\W+", "_", task).strip("_")
            paths.append(directory / f"{name}.png")
            plot_by_length(self, task, paths[-1])
            if self.depths(task):
                paths.append(directory / f"{name}_depths.png")
                plot_by_depth(self, task, paths[-1])
        return paths

    def _page(self, directory: Path) -> list[Path]:
        try:
            from hf_rope_ext.evals.page import render
        except ImportError:
            return []
        path = directory / "report.html"
        path.write_text(render(self), encoding="utf-8")
        return [path]

    def depths(self, task: str) -> list[float]:
        """Return the depths of a task, shallow first."""
        parts = (p for c in self.cells if c["task"] == task for p in c.get("parts", []))
        return sorted({part["depth"] for part in parts if part["depth"] is not None})

    def at_depth(self, method: str, task: str, length: int, depth: float) -> dict[str, Any] | None:
        """Return the part of a cell at one depth; None if it is not finished."""
        cell = self.cell(method, task, length)
        parts = cell.get("parts", []) if cell else []
        return next((part for part in parts if part["depth"] == depth), None)

    def _is_plain(self, label: str) -> bool:
        return bool(self.settings["methods"][label]["name"] == "none")

    def _reach(self, scores: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
        own = statistics.base_score(base, self.trained)
        return {
            "effective_length": statistics.effective_length(scores),
            "own_effective_length": statistics.own_effective_length(scores, own),
            "k_max": statistics.k_max(scores),
        }

    def _cost(self, scores: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
        shared = [length for length in scores if length <= self.trained and length in base]
        if not shared:
            return {"change": None}
        return {"change": scores[max(shared)] / base[max(shared)] - 1}

    def _ruler(self, method: str, tasks: list[str]) -> dict[str, Any]:
        every = [self.scores(method, task) for task in tasks]
        lengths = set.intersection(*(set(scores) for scores in every))
        if not lengths:
            return {}
        mean = {length: sum(one[length] for one in every) / len(every) for length in lengths}
        rising, falling = statistics.weighted_averages(mean)
        ordered = {str(length): mean[length] for length in sorted(mean)}
        reach = self._reach(mean, mean)
        return {"mean": ordered, "average_rising": rising, "average_falling": falling, **reach}


def load_report(directory: Path) -> Report:
    """Return a saved report.

    Raises:
        RopeError: If there is none, or it is of another schema.
    """
    path = directory / "report.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RopeError(f"cannot read a report from {str(path)!r}: {error}") from error
    if content.get("settings", {}).get("schema_version") != SCHEMA_VERSION:
        raise RopeError(f"{str(path)!r} is not a report of schema version {SCHEMA_VERSION}.")
    return Report(**{name: content[name] for name in Report.__dataclass_fields__})


def environment(model: nn.Module) -> dict[str, str]:
    """Return versions and the kind of device."""
    return {
        "hf_rope_ext": version("hf-rope-ext"),
        "transformers": version("transformers"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": next(model.parameters()).device.type,
    }

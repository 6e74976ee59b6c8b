"""Write a report to files, and show it as tables."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.report import Report

if TYPE_CHECKING:
    from rich.table import Table


def save_report(report: Report, directory: Path) -> list[Path]:
    """Write ``report.json``, ``cells.csv``, and whatever the installed packages allow.

    With jinja2 that is ``report.html``; with matplotlib, a plot per task and a heat map per task
    with depths.

    Returns:
        The files written.

    Raises:
        RopeError: If they cannot be written.
    """
    content = {**asdict(report), "summary": report.summary()}
    json_path, csv_path = directory / "report.json", directory / "cells.csv"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=2) + "\n")
        _write_csv(report, csv_path)
        plots, pages = _write_plots(report, directory), _write_page(report, directory)
    except OSError as error:
        raise RopeError(
            f"cannot write the report to {str(directory)!r}: {error.strerror or error}."
        ) from error
    return [json_path, csv_path, *plots, *pages]


def make_table(report: Report, task: str) -> "Table":
    """Return a table of one task: methods by lengths."""
    from rich.table import Table

    table = Table(title=report.title(task), title_justify="left")
    table.add_column("method")
    for length in report.lengths(task):
        multiple = report.multiple(length)
        table.add_column(f"{length} ({multiple})" if multiple else str(length), justify="right")
    if report.is_score(task):
        table.add_column("reads up to", justify="right")
    reach = report.summary().get(task, {})
    for method in report.methods:
        row = [report.shown(method, task, length) for length in report.lengths(task)]
        if report.is_score(task):
            row.append(str(reach.get(method, {}).get("own_effective_length") or "-"))
        table.add_row(method, *row)
    return table


def _write_csv(report: Report, path: Path) -> None:
    rows = list(_flatten(report))
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _flatten(report: Report) -> Iterator[dict[str, Any]]:
    """Yield flat rows: each cell, followed by its depths, groups or position buckets."""
    for cell in report.cells:
        lists = {key: value for key, value in cell.items() if isinstance(value, list)}
        yield {key: value for key, value in cell.items() if key not in lists}
        place = {key: cell[key] for key in ("method", "task", "length")}
        for parts in lists.values():
            yield from ({**place, **part} for part in parts)


def _write_plots(report: Report, directory: Path) -> list[Path]:
    try:
        from hf_rope_ext.evals.plots import plot_by_depth, plot_by_length
    except ImportError:
        return []
    paths = []
    for task in report.tasks:
        name = re.sub(r"\W+", "_", task).strip("_")
        paths.append(directory / f"{name}.png")
        plot_by_length(report, task, paths[-1])
        if report.depths(task):
            paths.append(directory / f"{name}_depths.png")
            plot_by_depth(report, task, paths[-1])
    return paths


def _write_page(report: Report, directory: Path) -> list[Path]:
    try:
        from hf_rope_ext.evals.page import render
    except ImportError:
        return []
    path = directory / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return [path]

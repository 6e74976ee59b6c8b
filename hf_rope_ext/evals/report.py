"""What a comparison found: a table, JSON, CSV and plots."""

import csv
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_rope_ext.errors import RopeError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1

METRICS = {"perplexity": "perplexity", "passkey": "exact"}
"""The number of each task that tables and plots show."""

TITLES = {
    "perplexity": "perplexity of the same tokens (lower is better)",
    "passkey": "pass keys retrieved (higher is better)",
}


@dataclass(frozen=True)
class Report:
    """The numbers of a comparison and all they depend on.

    Args:
        settings: Model, methods, lengths, text and seed.
        environment: Versions and machine.
        cells: One entry for each method, task and length.
    """

    settings: dict[str, Any]
    environment: dict[str, str]
    cells: list[dict[str, Any]]

    def value(self, method: str, task: str, length: int) -> float:
        """Return the number that tables and plots show of one cell."""
        for cell in self.cells:
            if (cell["method"], cell["task"], cell["length"]) == (method, task, length):
                return float(cell[METRICS[task]])
        raise KeyError((method, task, length))

    def table(self, task: str) -> "Table":
        """Return methods by lengths."""
        from rich.table import Table

        trained = self.settings["model"]["trained_length"]
        table = Table(title=TITLES[task], title_justify="left")
        table.add_column("method")
        for length in self.settings["lengths"]:
            table.add_column(f"{length} ({length / trained:g}x)", justify="right")
        for method in self.settings["methods"]:
            values = [self.value(method, task, length) for length in self.settings["lengths"]]
            shown = [f"{value:.0%}" if task == "passkey" else f"{value:.4g}" for value in values]
            table.add_row(method, *shown)
        return table

    def save(self, directory: Path) -> list[Path]:
        """Write ``report.json``, ``cells.csv`` and, where matplotlib is installed, a plot per task.

        Returns:
            The files written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        report, cells = directory / "report.json", directory / "cells.csv"
        report.write_text(json.dumps(asdict(self), indent=2) + "\n")
        columns = dict.fromkeys(key for cell in self.cells for key in cell)
        with cells.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(self.cells)
        return [report, cells, *self._plots(directory)]

    def _plots(self, directory: Path) -> list[Path]:
        try:
            from hf_rope_ext.evals.plots import plot_by_length
        except ImportError:
            return []
        paths = []
        for task in METRICS:
            paths.append(directory / f"{task}.png")
            plot_by_length(self, task, paths[-1])
        return paths


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
    return Report(**content)


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

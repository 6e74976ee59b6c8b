"""Keep finished cells in a file, so that an interrupted run can resume."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError


@dataclass(frozen=True)
class Cell:
    """One measurement: a method on a task at a length."""

    method: str
    task: str
    length: int


class Journal:
    """A file of settings in the first line, followed by one finished cell per line.

    Args:
        directory: Directory of ``cells.jsonl``.
        settings: Everything the results depend on, as JSON data.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.path = directory / "cells.jsonl"
        self.settings = settings

    def read(self) -> dict[Cell, dict[str, Any]]:
        """Return the cells finished by earlier runs.

        Raises:
            RopeError: If the settings differ, or the directory is not writable.
        """
        try:
            return self._read()
        except OSError as error:
            raise self._unusable(error) from error

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Append a finished cell.

        Raises:
            RopeError: If it cannot be written; earlier cells are intact.
        """
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"cell": asdict(cell), "result": result}) + "\n")
        except OSError as error:
            raise self._unusable(error) from error

    def _read(self) -> dict[Cell, dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file() or not self.path.read_text():
            self.path.write_text(json.dumps(self.settings) + "\n")
            return {}
        first, *lines = self.path.read_text().splitlines()
        different = self._differences(first)
        if different:
            raise RopeError(
                f"{str(self.path.parent)!r} holds results of another comparison ({different}); "
                f"choose another output directory, or remove that one."
            )
        cells = {}
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # truncated by an interruption: measure it again
                kept = [first, *lines[:number]]
                self.path.write_text("".join(f"{complete}\n" for complete in kept))
                break
            cells[Cell(**entry["cell"])] = entry["result"]
        return cells

    def _differences(self, line: str) -> str:
        """Return in words how stored settings differ; empty if they do not."""
        try:
            stored = json.loads(line)
        except json.JSONDecodeError:
            return "unreadable settings"
        different = _different(stored, self.settings)
        return f"different {', '.join(different)}" if different else ""

    def _unusable(self, error: OSError) -> RopeError:
        return RopeError(
            f"cannot write {str(self.path)!r}: {error.strerror or error}. Finished cells are kept; "
            f"free some space or choose another output directory, and run again."
        )


def _different(stored: Any, settings: dict[str, Any], inside: str = "") -> list[str]:
    """Return the settings that differ, those of the model as ``model.dtype``, numbers with both."""
    stored = stored if isinstance(stored, dict) else {}
    different = []
    for name in dict.fromkeys([*settings, *stored]):
        before, now = stored.get(name), settings.get(name)
        if name == "model" and isinstance(before, dict) and isinstance(now, dict):
            different += _different(before, now, "model.")
        elif before != now or (name in stored) != (name in settings):
            both = isinstance(before, int | float) and isinstance(now, int | float)
            values = f" ({before:g} there, {now:g} here)" if both else ""
            different.append(f"{inside}{name}{values}")
    return different

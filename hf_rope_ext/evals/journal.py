"""Finished cells in a file, so that a run that was stopped goes on where it was."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError


@dataclass(frozen=True)
class Cell:
    """One measurement to make."""

    method: str
    task: str
    length: int


class Journal:
    """Finished cells, one line each, after a line of settings.

    Args:
        directory: Where ``cells.jsonl`` is kept.
        settings: Everything the numbers depend on.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.path = directory / "cells.jsonl"
        self.settings = settings

    def read(self) -> dict[Cell, dict[str, Any]]:
        """Return the cells finished earlier.

        Raises:
            RopeError: If they belong to another comparison, or the directory cannot be used.
        """
        try:
            return self._read()
        except OSError as error:
            raise self._unusable(error) from error

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep a finished cell.

        Raises:
            RopeError: If it cannot be written; cells kept earlier are whole.
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
        if not self._is_own(first):
            raise RopeError(
                f"{str(self.path.parent)!r} holds a comparison of something else; give another "
                f"output directory, or remove that one."
            )
        cells = {}
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off while it was written: measured again
                kept = [first, *lines[:number]]
                self.path.write_text("".join(f"{whole}\n" for whole in kept))
                break
            cells[Cell(**entry["cell"])] = entry["result"]
        return cells

    def _is_own(self, line: str) -> bool:
        try:
            return bool(json.loads(line) == self.settings)
        except json.JSONDecodeError:
            return False

    def _unusable(self, error: OSError) -> RopeError:
        return RopeError(
            f"cannot write {str(self.path)!r}: {error.strerror or error}. Finished cells are kept; "
            f"make room or give another output directory, and call again."
        )

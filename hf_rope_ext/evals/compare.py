"""Compare methods on one model: each is patched in, measured at every length, and taken out."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.passkey import PasskeyTask
from hf_rope_ext.evals.perplexity import PerplexityTask
from hf_rope_ext.evals.report import SCHEMA_VERSION, Report, environment
from hf_rope_ext.evals.text import tokenize
from hf_rope_ext.methods import Method, method_record
from hf_rope_ext.patching import patch_of, patched
from hf_rope_ext.sites import read_sites

TOKENS_AT_ONCE = 8192
"""Tokens of one forward at most; a longer single row still goes in one."""


class Task(Protocol):
    """One thing to measure at every length."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, float]:
        """Return its numbers at a length; ``advance`` is told of every sample done."""


@dataclass(frozen=True)
class Cell:
    """One measurement to make."""

    method: str
    task: str
    length: int


@dataclass(frozen=True)
class Comparison:
    """What to compare on which model.

    Args:
        model: An unpatched causal language model.
        tokenizer: Its tokenizer.
        text: Text for perplexity, and to hide pass keys in.
        methods: Methods by the label they are reported under.
        lengths: In tokens, ascending.
        windows: Places in the text where perplexity is measured.
        targets: Tokens scored at each place.
        samples: Pass keys per length.
        seed: Of the pass keys.
        name: What the model is called in the report.
        replace: Whether methods replace a scaling in the model's own config.
    """

    model: nn.Module
    tokenizer: Any
    text: str
    methods: dict[str, Method]
    lengths: tuple[int, ...]
    windows: int = 32
    targets: int = 64
    samples: int = 50
    seed: int = 0
    name: str = "model"
    replace: bool = False

    def tasks(self) -> tuple[Task, ...]:
        """Return what is measured.

        Raises:
            RopeError: If the text is too short for the lengths.
        """
        ids = tokenize(self.tokenizer, self.text)
        start = self.tokenizer.bos_token_id
        prefix = () if start is None else (int(start),)
        longest = max(self.lengths)
        return (
            PerplexityTask(ids, longest, self.windows, self.targets, prefix),
            PasskeyTask(self.tokenizer, ids, longest, self.samples, self.seed, prefix),
        )

    def settings(self) -> dict[str, Any]:
        """Return everything the numbers depend on, as JSON data."""
        site = read_sites(self.model)[0]
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": self.name,
                "model_type": site.config.model_type,
                "parameters": sum(part.numel() for part in self.model.parameters()),
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
                "weights_sha256": weights_digest(self.model),
                "trained_length": site.geometry.original_max_position_embeddings,
            },
            "methods": {label: method_record(method) for label, method in self.methods.items()},
            "lengths": list(self.lengths),
            "text_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "windows": self.windows,
            "targets": self.targets,
            "samples": self.samples,
            "seed": self.seed,
        }


def compare(
    comparison: Comparison,
    output: Path | None = None,
    on_progress: Callable[[Cell, int, int], None] | None = None,
) -> Report:
    """Measure every method at every length, shortest first.

    Args:
        comparison: What to measure.
        output: Directory that keeps each finished cell, so that an interrupted comparison goes on
            where it stopped.
        on_progress: Called with the cell at work, samples done and samples in all.

    Raises:
        RopeError: If the directory holds another comparison, or a method cannot be patched in.
    """
    if patch_of(comparison.model) is not None:
        raise RopeError("compare patches the model itself; pass it unpatched.")
    settings = comparison.settings()
    tasks = {task.name: task for task in comparison.tasks()}
    for method in comparison.methods.values():
        with _extended(comparison, method):
            pass  # every method is known to work before the first is measured
    journal = _Journal(output, settings) if output else None
    done = journal.read() if journal else {}
    cells = [
        Cell(label, task, length)
        for length in comparison.lengths
        for label in comparison.methods
        for task in tasks
    ]
    each = {"perplexity": comparison.windows, "passkey": comparison.samples}
    total = sum(each[cell.task] for cell in cells)
    finished = sum(each[cell.task] for cell in cells if cell in done)
    comparison.model.eval()
    for cell in cells:
        if cell in done:
            continue
        before = finished

        def advance(samples: int, cell: Cell = cell) -> None:
            nonlocal finished
            finished += samples
            if on_progress:
                on_progress(cell, finished, total)

        with _extended(comparison, comparison.methods[cell.method]):
            size = max(TOKENS_AT_ONCE // cell.length, 1)
            done[cell] = tasks[cell.task].measure(comparison.model, cell.length, size, advance)
        finished = before + each[cell.task]
        if journal:
            journal.add(cell, done[cell])
    rows = [{**asdict(cell), **done[cell]} for cell in cells]
    return Report(settings=settings, environment=environment(comparison.model), cells=rows)


def weights_digest(model: nn.Module) -> str:
    """Return a hash that tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()[:4096].to("cpu").contiguous()
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _extended(comparison: Comparison, method: Method) -> Iterator[None]:
    with patched(comparison.model, method, replace=comparison.replace):
        yield


class _Journal:
    """Finished cells in a file, one line each."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.path = directory / "cells.jsonl"
        self.settings = settings
        directory.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[Cell, dict[str, float]]:
        """Return the cells finished earlier.

        Raises:
            RopeError: If they belong to another comparison.
        """
        if not self.path.is_file():
            self.path.write_text(json.dumps(self.settings) + "\n")
            return {}
        first, *lines = self.path.read_text().splitlines()
        if json.loads(first) != self.settings:
            raise RopeError(
                f"{str(self.path.parent)!r} holds a comparison of something else; give another "
                f"output directory, or remove that one."
            )
        cells = {}
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off while it was written: measured again
                kept = [first, *lines[: number - 1]]
                self.path.write_text("".join(f"{whole}\n" for whole in kept))
                break
            cells[Cell(**entry["cell"])] = entry["result"]
        return cells

    def add(self, cell: Cell, result: dict[str, float]) -> None:
        """Keep a finished cell."""
        with self.path.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), "result": result}) + "\n")

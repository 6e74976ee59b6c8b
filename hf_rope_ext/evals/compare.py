"""Measure methods, tasks and lengths; each method is patched in, measured, and taken out."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.journal import Cell, Journal
from hf_rope_ext.evals.measures import Bench, Measure, make_measures
from hf_rope_ext.evals.report import SCHEMA_VERSION, Report, environment
from hf_rope_ext.methods import Method, NoScaling, method_record
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.parsing import parse_lengths
from hf_rope_ext.patching.patch import patched
from hf_rope_ext.rotary.installed import patch_of

TOKENS_AT_ONCE = 8192
"""Tokens of one forward at most; a longer single row still goes in one."""

Progress = Callable[[Cell, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What to compare on which model.

    Args:
        model: An unpatched causal language model.
        tokenizer: Its tokenizer.
        text: Text for perplexity, and to hide pass keys in.
        methods: Methods by the label they are reported under.
        lengths: In tokens, ascending.
        tasks: What is measured: names with options, such as ``"rope_needle:depths=[0,1]"``.
        windows: Places in the text where perplexity is measured.
        targets: Tokens scored at each place.
        samples: Documents per length and depth.
        seed: Of the documents.
        name: What the model is called in the report.
        replace: Whether methods replace a scaling in the model's own config.
        processor: Its processor, for tasks that show images.
    """

    model: nn.Module
    tokenizer: Any
    text: str
    methods: dict[str, Method]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = ("perplexity", "passkey")
    windows: int = 32
    targets: int = 64
    samples: int = 50
    seed: int = 0
    name: str = "model"
    replace: bool = False
    processor: Any = None

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """What is measured, by label.

        Raises:
            RopeError: If a task cannot be made, or the text is too short for the lengths.
        """
        bench = Bench(
            self.tokenizer,
            self.text,
            max(self.lengths),
            self.trained,
            self.windows,
            self.targets,
            self.samples,
            self.seed,
            self.processor,
        )
        return make_measures(self.tasks, bench)

    @property
    def trained(self) -> int:
        """The trained length."""
        patch = patch_of(self.model)
        sites = read_sites(self.model) if patch is None else patch.sites
        return sites[0].geometry.original_max_position_embeddings

    def settings(self) -> dict[str, Any]:
        """Return everything the numbers depend on, as JSON data."""
        config = self.model.config
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": self.name,
                "model_type": config.model_type,  # type: ignore[union-attr]
                "parameters": sum(part.numel() for part in self.model.parameters()),
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
                "weights_sha256": weights_digest(self.model),
                "trained_length": self.trained,
            },
            "methods": {label: method_record(method) for label, method in self.methods.items()},
            "tasks": {label: measure.metric for label, measure in self.measures.items()},
            "lengths": list(self.lengths),
            "text_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "windows": self.windows,
            "targets": self.targets,
            "samples": self.samples,
            "seed": self.seed,
        }

    def cells(self) -> list[Cell]:
        """Return everything to measure, shortest lengths first."""
        every = {
            (length, task)
            for task, measure in self.measures.items()
            for length in measure.lengths(self.lengths)
        }
        return [
            Cell(label, task, length)
            for length in sorted({length for length, _ in every})
            for label in self.methods
            for task in self.measures
            if (length, task) in every
        ]


def compare(
    comparison: Comparison,
    output: Path | None = None,
    on_progress: Progress | None = None,
    max_minutes: float | None = None,
) -> Report:
    """Measure every method at every length, shortest first.

    Args:
        comparison: What to measure.
        output: Directory that keeps each finished cell, so that an interrupted comparison goes on
            where it stopped.
        on_progress: Called with the cell at work, tokens done and tokens in all.
        max_minutes: When to stop; the report then holds the finished cells.

    Raises:
        RopeError: If the directory holds another comparison, a task lacks something, or a method
            cannot be patched in.
    """
    if patch_of(comparison.model) is not None:
        raise RopeError("compare patches the model itself; pass it unpatched.")

    def extended(label: str) -> AbstractContextManager[Any]:
        method = comparison.methods[label]
        return patched(comparison.model, method, replace=comparison.replace)

    settings = comparison.settings()
    _check(comparison)
    for label in comparison.methods:
        with extended(label):
            pass  # every method is known to work before the first is measured
    return _run(comparison, settings, extended, output, on_progress, max_minutes)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int | str],
    *,
    text: str = "",
    samples: int = 10,
    seed: int = 42,
    name: str = "model",
    beyond: bool = False,
    processor: Any = None,
    output: Path | None = None,
    on_progress: Progress | None = None,
    max_minutes: float | None = None,
) -> Report:
    """Measure a model as it is, patched or not.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names with options, such as ``"rope_needle:depths=[0,1]"``.
        lengths: In tokens, or times the trained length: ``"2x"``.
        text: Text for perplexity.
        samples: Documents per length and depth.
        seed: Of the documents.
        name: What the model is called in the report.
        beyond: Whether to measure past the length the model says it reads.
        processor: Its processor, for tasks that show images.
        output: As in `compare`.
        on_progress: As in `compare`.
        max_minutes: As in `compare`.

    Raises:
        RopeError: If a length is beyond ``max_position_embeddings``, a task is unknown, or the
            output directory holds something else.
    """
    patch = patch_of(model)
    method = NoScaling() if patch is None else patch.method
    asked = Comparison(model, tokenizer, text, {}, (1,))
    found = parse_lengths(",".join(map(str, lengths)), asked.trained)
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    reads = getattr(config, "max_position_embeddings", None)
    if reads is not None and found[-1] > reads and not beyond:
        raise RopeError(
            f"a length of {found[-1]} is beyond the {reads} positions this model reads; patch it "
            f"with factor={found[-1] / asked.trained:g} or more, or pass beyond=True to see what "
            f"happens there."
        )
    comparison = Comparison(
        model=model,
        tokenizer=tokenizer,
        text=text,
        methods={method.name: method},
        lengths=found,
        tasks=tuple(tasks),
        samples=samples,
        seed=seed,
        name=name,
        processor=processor,
    )
    settings = comparison.settings()
    _check(comparison)
    return _run(comparison, settings, lambda label: nullcontext(), output, on_progress, max_minutes)


def weights_digest(model: nn.Module) -> str:
    """Return a hash that tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()[:4096].to("cpu").contiguous()
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _OutOfTimeError(Exception):
    """The time is up; unfinished cells stay unfinished."""


def _check(comparison: Comparison) -> None:
    """Raise what a cell would raise, before the first is measured."""
    for measure in comparison.measures.values():
        measure.check(measure.lengths(comparison.lengths))


def _run(
    comparison: Comparison,
    settings: dict[str, Any],
    extended: Callable[[str], AbstractContextManager[Any]],
    output: Path | None,
    on_progress: Progress | None,
    max_minutes: float | None,
) -> Report:
    stop = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
    journal = Journal(output, settings) if output else None
    done = journal.read() if journal else {}
    cells, measures = comparison.cells(), comparison.measures
    steps = {cell: measures[cell.task].units(cell.length) * cell.length for cell in cells}
    total = sum(steps.values())
    finished = sum(steps[cell] for cell in cells if cell in done)
    model = comparison.model.eval()
    for cell in cells:
        if cell in done:
            continue
        advance = _Advance(cell, finished, total, on_progress, stop)
        size = max(TOKENS_AT_ONCE // cell.length, 1)
        try:
            advance(0)
            with extended(cell.method):
                done[cell] = measures[cell.task].measure(model, cell.length, size, advance)
        except _OutOfTimeError:
            break
        finished += steps[cell]
        if journal:
            journal.add(cell, done[cell])
    rows = [{**asdict(cell), **done[cell]} for cell in cells if cell in done]
    missing = [asdict(cell) for cell in cells if cell not in done]
    return Report(settings, environment(model), rows, missing)


@dataclass
class _Advance:
    """Counts the tokens of finished samples, and stops the run when its time is up."""

    cell: Cell
    done: int
    total: int
    tell: Progress | None
    stop: float | None

    def __call__(self, samples: int) -> None:
        self.done += samples * self.cell.length
        if self.tell and samples:
            self.tell(self.cell, self.done, self.total)
        if self.stop is not None and time.monotonic() > self.stop:
            raise _OutOfTimeError

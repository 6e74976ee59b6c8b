"""Compare methods on tasks over context lengths; each method is patched in only while it runs."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from hf_rope_ext.checks import require_bool, require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.fingerprint import (
    environment,
    model_settings,
    processor_digest,
    text_digest,
    tokenizer_digest,
    trained_length,
    versions,
)
from hf_rope_ext.evals.generation import answer_config
from hf_rope_ext.evals.journal import Cell, Journal
from hf_rope_ext.evals.measures import Measure, make_measures
from hf_rope_ext.evals.report import SCHEMA_VERSION, Report
from hf_rope_ext.methods import Method, NoScaling, method_record
from hf_rope_ext.parsing import parse_lengths
from hf_rope_ext.patching.patch import patched
from hf_rope_ext.rotary.installed import patch_of

TOKENS_AT_ONCE = 8192
"""Maximum tokens per batch; a single longer row still runs as one."""

Progress = Callable[[Cell, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What to compare, and on which model.

    Args:
        model: A causal language model.
        tokenizer: The model's tokenizer.
        text: Text for perplexity and for hiding pass keys.
        methods: Methods by label.
        lengths: Context lengths in tokens, ascending.
        tasks: Task specifications: names with options, such as ``"rope_needle:depths=[0,1]"``.
        windows: Windows of text for perplexity.
        targets: Tokens scored at the end of each window.
        samples: Questions per length, and per depth for tasks with depths.
        seed: Seed for all sampling.
        name: Name of the model in the report.
        replace: Whether methods replace a scaling in the model's own config.
        processor: The model's processor, for tasks that show images.
        original_max_position_embeddings: The trained length, where the config does not tell.

    Raises:
        RopeError: If a number is out of range, or there are no lengths.
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
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not callable(self.tokenizer):
            raise RopeError(f"tokenizer must be the model's tokenizer, got {self.tokenizer!r}.")
        if self.original_max_position_embeddings is not None:
            name = "original_max_position_embeddings"
            require_integer(name, self.original_max_position_embeddings, 2, unit="positions")
        if not self.lengths:
            raise RopeError("give at least one length, such as 4096.")
        for length in self.lengths:
            require_integer("lengths", length, 1, unit="tokens")
        for argument in ("windows", "targets", "samples"):
            require_integer(argument, getattr(self, argument), 1)
        require_bool("replace", self.replace)

    @property
    def trained(self) -> int:
        """The trained length in positions; 0 if it is not known."""
        return self.original_max_position_embeddings or trained_length(self.model)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Measures by label.

        Raises:
            RopeError: If a task cannot be made, or the text is too short.
        """
        bench = Bench(
            tokenizer=self.tokenizer,
            text=self.text,
            longest=max(self.lengths),
            trained=self.trained,
            windows=self.windows,
            targets=self.targets,
            samples=self.samples,
            seed=self.seed,
            processor=self.processor,
        )
        return make_measures(self.tasks, bench)

    def settings(self) -> dict[str, Any]:
        """Return everything the results depend on, as JSON data."""
        settings = {
            "schema_version": SCHEMA_VERSION,
            "model": {**model_settings(self.model, self.name), "trained_length": self.trained},
            "answers": answer_config(self.model, self.tokenizer).to_dict(),
            "versions": versions(),
            "tokenizer_sha256": tokenizer_digest(self.tokenizer),
            "processor_sha256": processor_digest(self.processor),
            "methods": {label: method_record(method) for label, method in self.methods.items()},
            "replace": self.replace,
            "tasks": {label: measure.metric for label, measure in self.measures.items()},
            "sources": {label: dict(m.sources) for label, m in self.measures.items() if m.sources},
            "lengths": self.lengths,
            "text_sha256": text_digest(self.text),
            "windows": self.windows,
            "targets": self.targets,
            "samples": self.samples,
            "seed": self.seed,
        }
        # as read back from a file, so that both compare equal
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def cells(self) -> list[Cell]:
        """Return all cells to measure, shortest lengths first."""
        pairs = {
            (length, task)
            for task, measure in self.measures.items()
            for length in measure.lengths(self.lengths)
        }
        return [
            Cell(label, task, length)
            for length in sorted({length for length, _ in pairs})
            for label in self.methods
            for task in self.measures
            if (length, task) in pairs
        ]


def compare(
    comparison: Comparison,
    output: Path | None = None,
    on_progress: Progress | None = None,
    max_minutes: float | None = None,
) -> Report:
    """Measure every method on every task at every length, shortest first.

    Args:
        comparison: What to compare; the model must not be patched.
        output: Directory to keep finished cells in, so that an interrupted comparison resumes.
        on_progress: Called with the current cell, the tokens done and the total number of tokens.
        max_minutes: Time limit; the report then holds the cells finished by then.

    Raises:
        RopeError: If the directory holds another comparison, a task cannot be measured, or a method
            cannot be applied.
    """
    if patch_of(comparison.model) is not None:
        raise RopeError("compare patches the model itself; pass it unpatched.")

    def apply(label: str) -> AbstractContextManager[Any]:
        method = comparison.methods[label]
        return patched(
            comparison.model,
            method,
            replace=comparison.replace,
            original_max_position_embeddings=comparison.original_max_position_embeddings,
        )

    settings = comparison.settings()
    _require_room(comparison)
    for label in comparison.methods:
        with apply(label):
            pass  # fail now rather than after hours
    return _run(comparison, settings, apply, output, on_progress, max_minutes)


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
    original_max_position_embeddings: int | None = None,
    output: Path | None = None,
    on_progress: Progress | None = None,
    max_minutes: float | None = None,
) -> Report:
    """Measure a model as it is, patched or not.

    Args:
        model: A causal language model.
        tokenizer: The model's tokenizer.
        tasks: Names with options, such as ``"rope_needle:depths=[0,1]"``.
        lengths: Context lengths in tokens, or relative to the trained length: ``"2x"``.
        text: Text for perplexity.
        samples: Questions per length, and per depth for tasks with depths.
        seed: Seed for all sampling.
        name: Name of the model in the report.
        beyond: Whether to allow lengths beyond the model's ``max_position_embeddings``.
        processor: The model's processor, for tasks that show images.
        original_max_position_embeddings: The trained length, where the config does not tell.
        output: As in `compare`.
        on_progress: As in `compare`.
        max_minutes: As in `compare`.

    Raises:
        RopeError: If a length is beyond ``max_position_embeddings``, a task is unknown, or the
            output directory holds other results.
    """
    patch = patch_of(model)
    method = NoScaling() if patch is None else patch.method
    trained = original_max_position_embeddings or trained_length(model)
    tokens = {n for length in lengths for n in parse_lengths(str(length), trained)}
    comparison = Comparison(
        model=model,
        tokenizer=tokenizer,
        text=text,
        methods={method.name: method},
        lengths=tuple(sorted(tokens)),
        tasks=tuple(tasks),
        samples=samples,
        seed=seed,
        name=name,
        processor=processor,
        original_max_position_embeddings=original_max_position_embeddings,
    )
    if not beyond:
        _require_reach(model, comparison.lengths[-1], trained)
    settings = comparison.settings()
    _require_room(comparison)
    return _run(comparison, settings, lambda label: nullcontext(), output, on_progress, max_minutes)


class _OutOfTimeError(Exception):
    """The time limit is reached; unfinished cells stay unfinished."""


def _require_reach(model: nn.Module, longest: int, trained: int) -> None:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    reach = getattr(config, "max_position_embeddings", None)
    if reach is not None and longest > reach:
        factor = f"factor={longest / trained:g} or more" if trained else "a larger factor"
        raise RopeError(
            f"a length of {longest} is beyond the {reach} positions of this model; patch it with "
            f"{factor}, or pass beyond=True to measure it anyway."
        )


def _require_room(comparison: Comparison) -> None:
    """Raise now what a cell would raise later."""
    for measure in comparison.measures.values():
        measure.check(measure.lengths(comparison.lengths))


def _run(
    comparison: Comparison,
    settings: dict[str, Any],
    apply: Callable[[str], AbstractContextManager[Any]],
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
    with evaluation_mode(comparison.model) as model:
        for cell in cells:
            if cell in done:
                continue
            advance = _Advance(cell, finished, total, on_progress, stop)
            size = max(TOKENS_AT_ONCE // cell.length, 1)
            try:
                advance(0)
                with apply(cell.method):
                    done[cell] = measures[cell.task].run(model, cell.length, size, advance)
            except _OutOfTimeError:
                break
            finished += steps[cell]
            if journal:
                journal.add(cell, done[cell])
    rows = [{**asdict(cell), **done[cell]} for cell in cells if cell in done]
    missing = [asdict(cell) for cell in cells if cell not in done]
    return Report(settings, environment(model), rows, missing)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode for the duration of a ``with`` block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class _Advance:
    """Counts the tokens of finished samples, and stops the run when its time is up."""

    cell: Cell
    done: int
    total: int
    report: Progress | None
    stop: float | None

    def __call__(self, samples: int) -> None:
        self.done += samples * self.cell.length
        if self.report and samples:
            self.report(self.cell, self.done, self.total)
        if self.stop is not None and time.monotonic() > self.stop:
            raise _OutOfTimeError

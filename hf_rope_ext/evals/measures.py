"""Turn task specifications into measures: what to run on a model, length by length."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.answering import Row, answer, to_row
from hf_rope_ext.evals.bench import Advance, Bench
from hf_rope_ext.evals.documents import build
from hf_rope_ext.evals.registry import GROUPS, TASKS, make_task, option_names, require_known
from hf_rope_ext.evals.statistics import by_place
from hf_rope_ext.evals.tasks.base import DocumentTask, FrameTask, Task, TextTask
from hf_rope_ext.evals.visual_documents import VisualDocuments
from hf_rope_ext.parsing import parse_task

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """One task on one bench, ready to run on any model.

    Args:
        metric: Key of the result that tables and plots show.
        units: Number of samples in a cell, by length.
        check: Raises `RopeError` if one of the lengths is too short for the task.
        run: Called with model, length, batch size and a callback for the number of samples
            finished; returns the results of one cell.
        lengths: The lengths to measure at, from those requested.
        sources: Hash of the content of each file that an option of the task names, by option.
    """

    metric: str
    units: Callable[[int], int]
    check: Callable[[Lengths], None]
    run: Callable[[nn.Module, int, int, Advance], dict[str, Any]]
    lengths: Callable[[Lengths], Lengths] = lambda requested: requested
    sources: Mapping[str, str] = field(default_factory=dict)


def make_measures(specifications: Iterable[str], bench: Bench) -> dict[str, Measure]:
    """Return measures by label from specifications such as ``"rope_needle:depths=[0,0.5,1]"``.

    Raises:
        RopeError: If a task or an option is unknown, or a requirement is missing.
    """
    measures: dict[str, Measure] = {}
    for specification in specifications:
        name, options = parse_task(specification)
        require_known(name, [*TASKS, *GROUPS])
        for task in GROUPS.get(name, [name]):
            label = specification.strip().replace(name, task, 1)
            measures[label] = make_measure(task, options, bench)
    return measures


def make_measure(name: str, options: dict[str, Any], bench: Bench) -> Measure:
    """Return the measure of a task.

    Args:
        name: One of `TASKS`.
        options: Options of the task; for tasks of questions also ``samples``.
        bench: The inputs that tasks share.

    Raises:
        RopeError: If the task or an option is unknown, or a requirement is missing.
    """
    samples = bench.samples
    if not isinstance(TASKS.get(name), TextTask):
        samples = options.get("samples", samples)
        options = {option: value for option, value in options.items() if option != "samples"}
        require_integer("samples", samples, 1)
    task = make_task(name, **options)
    return replace(_measure(name, task, bench, samples), sources=_sources(task))


def _measure(name: str, task: Task, bench: Bench, samples: int) -> Measure:
    if isinstance(task, TextTask):
        return _measure_text(task, bench)
    if isinstance(task, FrameTask):
        return _measure_frames(name, task, bench, samples)
    if isinstance(task, DocumentTask):
        return _measure_documents(name, task, bench, samples)
    raise RopeError(f"{name} is of a kind without a measure: {type(task).__name__}.")


def _sources(task: Task) -> dict[str, str]:
    """Return a hash of each file that a task reads; a label names the file, not what it holds."""
    values = {option: getattr(task, option) for option in option_names(task)}
    return {
        option: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for option, value in values.items()
        if isinstance(value, str) and Path(value).is_file()
    }


def _measure_text(task: TextTask, bench: Bench) -> Measure:
    def check(lengths: Lengths) -> None:
        for length in lengths:
            task.units(bench, length)

    task.require_text(bench)
    return Measure(
        metric=task.metric,
        units=partial(task.units, bench),
        check=check,
        run=partial(task.measure, bench),
        lengths=partial(task.lengths, bench),
    )


def _measure_documents(name: str, task: DocumentTask, bench: Bench, samples: int) -> Measure:
    @cache  # built once for all methods
    def rows(length: int) -> list[Row]:
        documents = build(name, task, bench.tokenizer, [length], samples, bench.seed)
        return [to_row(bench.tokenizer, document, task) for document in documents]

    def check(lengths: Lengths) -> None:
        rows(min(lengths))

    def run(model: nn.Module, length: int, size: int, advance: Advance) -> dict[str, Any]:
        results = answer(model, bench.tokenizer, rows(length), size, advance)
        places = [(row.document["depth"], row.document["group"]) for row in rows(length)]
        return by_place(places, results)

    return Measure(
        metric=task.metric,
        units=lambda length: samples * len(task.cells()),
        check=check,
        run=run,
    )


def _measure_frames(name: str, task: FrameTask, bench: Bench, samples: int) -> Measure:
    documents = VisualDocuments(name, task, bench.processor, samples, bench.seed)
    documents.require_processor()
    return Measure(
        metric=task.metric,
        units=lambda length: len(documents.places(length)),
        check=documents.check,
        run=documents.run,
    )

"""What can be measured at a length, by name: documents of a task, or the perplexity of a text."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.answering import Row, answer, to_row
from hf_rope_ext.evals.perplexity import LongPerplexityTask, PerplexityTask
from hf_rope_ext.evals.statistics import by_place
from hf_rope_ext.evals.tasks import (
    TASKS,
    build_dataset,
    make_task,
    require_known,
    with_options,
)
from hf_rope_ext.evals.tasks.visual_needle import VisualNeedle
from hf_rope_ext.evals.text import tokenize
from hf_rope_ext.evals.text_passkey import PasskeyTask
from hf_rope_ext.evals.visual_documents import FilmMeasure
from hf_rope_ext.parsing import parse_tasks

GROUPS = {
    "rope_ruler": [name for name in TASKS if name.startswith("rope_ruler_")],
    "rope_ruler_offline": [
        name for name in TASKS if name.startswith("rope_ruler_") and "_qa_" not in name
    ],
    "rope_babi": [name for name in TASKS if name.startswith("rope_babi_")],
}
"""Names that stand for several tasks."""


FILM_TASKS = {"rope_vniah": VisualNeedle(), "rope_vniah_d": VisualNeedle(period=8)}
"""Tasks over drawn frames, for models with a processor."""


class Measure(Protocol):
    """One thing to measure at every length."""

    @property
    def metric(self) -> str:
        """The number of a cell that tables and plots show."""

    def lengths(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """Return the lengths it is measured at."""

    def check(self, lengths: tuple[int, ...]) -> None:
        """Raise `RopeError` if a length has no room."""

    def units(self, length: int) -> int:
        """Return how many samples a cell takes."""

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the numbers of a cell; ``advance`` is told of every sample done."""


@dataclass(frozen=True)
class Bench:
    """What measures are made of.

    Args:
        tokenizer: The model's.
        text: Of the perplexities, and to hide token-level pass keys in.
        longest: The longest length asked for.
        trained: The model's trained length.
        windows: Places in the text where perplexity is measured.
        targets: Tokens scored at each place.
        samples: Documents per length, and per depth where a task has depths.
        seed: Of the documents.
        processor: The model's, where it takes images.
    """

    tokenizer: Any
    text: str
    longest: int
    trained: int
    windows: int = 32
    targets: int = 64
    samples: int = 50
    seed: int = 0
    processor: Any = None

    @cached_property
    def ids(self) -> Tensor:
        """The text's tokens."""
        if not self.text:
            raise RopeError(
                "perplexity and the passkey task need a long text: --text FILE on the command "
                "line, text=... in Python."
            )
        return tokenize(self.tokenizer, self.text)

    @property
    def prefix(self) -> tuple[int, ...]:
        """What goes before a window of text."""
        start = self.tokenizer.bos_token_id
        return () if start is None else (int(start),)


@dataclass(frozen=True)
class TextMeasure:
    """A perplexity, or another task over tokens of the text."""

    task: Any
    only: tuple[int, ...] = ()

    @property
    def metric(self) -> str:
        """The number of a cell that tables and plots show."""
        return str(self.task.metric)

    def lengths(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """Return the lengths it is measured at."""
        return self.only or asked

    def check(self, lengths: tuple[int, ...]) -> None:
        """Raise `RopeError` if a length has no room."""
        for length in lengths:
            self.task.units(length)

    def units(self, length: int) -> int:
        """Return how many windows a cell takes."""
        return int(self.task.units(length))

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the numbers of a cell."""
        found: dict[str, Any] = self.task.measure(model, length, size, advance)
        return found


@dataclass(frozen=True)
class DocumentMeasure:
    """The score of a task's documents, which are built once for all methods."""

    name: str
    bench: Bench
    options: dict[str, Any]
    built: dict[int, list[Row]] = field(default_factory=dict)

    metric = "score"

    def lengths(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """Return the lengths it is measured at."""
        return asked

    def check(self, lengths: tuple[int, ...]) -> None:
        """Raise `RopeError` if a length has no room."""
        self.rows(min(lengths))

    def units(self, length: int) -> int:
        """Return how many documents a cell takes."""
        return self.bench.samples * len(make_task(self.name, **self.options).cells())

    def rows(self, length: int) -> list[Row]:
        """Return the documents of a length, as tokens."""
        if length not in self.built:
            bench = self.bench
            documents = build_dataset(
                self.name, bench.tokenizer, [length], bench.samples, bench.seed, **self.options
            )
            self.built[length] = [to_row(bench.tokenizer, document) for document in documents]
        return self.built[length]

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the mean score with its interval, and the same for each depth or group."""
        rows = self.rows(length)
        results = answer(model, self.bench.tokenizer, rows, size, advance)
        places = [(row.document["depth"], row.document["group"]) for row in rows]
        return by_place(places, results)


def make_measures(tasks: tuple[str, ...], bench: Bench) -> dict[str, Measure]:
    """Return measures by label from specifications such as ``"rope_needle:depths=[0,0.5,1]"``.

    Raises:
        RopeError: If a task or an option is unknown, or something it needs is missing.
    """
    found: dict[str, Measure] = {}
    for label, name, options in parse_tasks(",".join(tasks)):
        for one in GROUPS.get(name, [name]):
            found[label.replace(name, one, 1)] = make_measure(one, options, bench)
    return found


def make_measure(name: str, options: dict[str, Any], bench: Bench) -> Measure:
    """Return the measure of a task.

    Raises:
        RopeError: If the task or an option is unknown, or something it needs is missing.
    """
    require_known(name, [*_TEXT_TASKS, *TASKS, *FILM_TASKS, *GROUPS])
    if name in _TEXT_TASKS:
        try:
            return _TEXT_TASKS[name](bench, **options)
        except TypeError as error:
            reason = str(error).partition("() ")[2]
            raise RopeError(f"{name}: {reason}.") from error
    own = {option: value for option, value in options.items() if option != "samples"}
    samples = options.get("samples", bench.samples)
    if name in FILM_TASKS:
        film = FilmMeasure(
            name, with_options(name, FILM_TASKS[name], own), bench.processor, samples, bench.seed
        )
        film.projector.check()
        return film
    make_task(name, **own)
    return DocumentMeasure(name, replace(bench, samples=samples), own)


def _perplexity(bench: Bench, tokens: int | None = None, **knobs: Any) -> Measure:
    """Perplexity of the same tokens at every length, in the text's first ``tokens`` tokens."""
    settings = {"windows": bench.windows, "targets": bench.targets, "prefix": bench.prefix, **knobs}
    return TextMeasure(PerplexityTask(bench.ids[:tokens], bench.longest, **settings))


def _sliding(bench: Bench, tokens: int | None = None, **knobs: Any) -> Measure:
    """Perplexity over windows; of a long text, four times the longest length is enough."""
    settings = {"mode": "sliding", **knobs}
    return _perplexity(bench, tokens=tokens or 4 * bench.longest, **settings)


def _longppl(bench: Bench, short: int | None = None, **knobs: Any) -> Measure:
    """Perplexity of the tokens that need more than the ``short`` context."""
    settings = {"short": short or max(bench.trained // 2, 8), "windows": 8, **knobs}
    return TextMeasure(
        LongPerplexityTask(bench.ids, bench.longest, prefix=bench.prefix, **settings)
    )


def _short(bench: Bench, windows: int | None = None) -> Measure:
    """Perplexity of ordinary text at the trained length: what a method costs where none is due."""
    task = PerplexityTask(
        bench.ids, bench.trained, windows or bench.windows, prefix=bench.prefix, mode="truncate"
    )
    return TextMeasure(task, only=(bench.trained,))


def _passkey(bench: Bench, samples: int | None = None) -> Measure:
    """Pass keys hidden in the text, token by token, scored in one forward."""
    return TextMeasure(
        PasskeyTask(
            bench.tokenizer,
            bench.ids,
            bench.longest,
            samples or bench.samples,
            bench.seed,
            bench.prefix,
        )
    )


_TEXT_TASKS: dict[str, Callable[..., Measure]] = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "rope_ppl": _sliding,
    "rope_longppl": _longppl,
    "rope_short": _short,
}


def needs_processor(tasks: tuple[str, ...]) -> bool:
    """Return whether a task shows images."""
    return any(name in FILM_TASKS for _, name, _ in parse_tasks(",".join(tasks)))


def describe_tasks() -> dict[str, str]:
    """Return each task's name with what it is, and the groups' names with their members."""
    texts = {name: make.__doc__ or "" for name, make in _TEXT_TASKS.items()}
    known = {**TASKS, **FILM_TASKS}
    documents = {name: type(task).__doc__ or "" for name, task in known.items()}
    groups = {name: f"All of {', '.join(members)}." for name, members in GROUPS.items()}
    return {
        name: " ".join(text.partition("\n\n")[0].split())
        for name, text in {**texts, **documents, **groups}.items()
    }

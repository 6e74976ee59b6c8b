"""Our tasks as lm-eval's: one class that the YAML files of ``eval_tasks`` name."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.lm_eval.metadata import (
    for_task,
    read_settings,
    trained_length,
    trained_length_of,
)
from hf_rope_ext.evals.measures import Bench, make_measure
from hf_rope_ext.evals.tasks import TASKS, build_dataset, make_task, score
from hf_rope_ext.evals.text import encode_pair, read_text

TASK_DIRECTORY = Path(str(files("hf_rope_ext.eval_tasks")))
"""What lm-eval's ``include_path`` takes."""

TEXT_OPTIONS = {
    "rope_ppl": ("mode", "stride", "windows", "targets", "tokens"),
    "rope_longppl": ("short", "windows", "alpha", "beta"),
    "rope_short": ("windows",),
}
"""Options of the tasks over a text."""


class Documents(list[dict[str, Any]]):
    """Documents as lm-eval reads a split; a ``datasets.Dataset`` would make their fields alike."""

    @property
    def features(self) -> dict[str, None]:
        """The fields that a YAML file may name."""
        return dict.fromkeys(self[0])


class RopeTask(ConfigurableTask):  # type: ignore[misc]
    """A task whose documents `hf_rope_ext.evals.tasks` builds; ``dataset_name`` says which.

    lm-eval's metadata holds its settings: ``lengths`` (in tokens or, as ``"1x,4x"``, times the
    trained length), ``samples`` per length and depth, ``seed``, ``tokenizer``, and the task's own
    options. Settings under the name of a task are for it alone.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = {key: value for key, value in config.items() if key != "class"}
        known = [*TASKS, *TEXT_OPTIONS]
        settings["metadata"] = for_task(config["metadata"], config["dataset_name"], known)
        super().__init__(config=settings)

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Build the documents."""
        name = self.config.dataset_name
        options = [field.name for field in fields(make_task(name))]
        settings = read_settings(self.config.metadata, options)
        documents = Documents(
            build_dataset(
                name,
                settings.tokenizer,
                settings.lengths,
                settings.samples,
                settings.seed,
                **settings.options,
            )
        )
        for document in documents:
            if document["target"]:
                asked = document["prompt"] + document["answer"]
                _, targets = encode_pair(settings.tokenizer, asked, document["target"])
                document["targets"] = targets
        self.dataset = {self.config.test_split: documents}
        sampling = documents[0]["sampling"]
        self.config.repeats = 1 if sampling is None else sampling["n"]
        self.config.metadata = settings.recorded(self.config.metadata)
        self._cells = sorted({cell for one in documents for cell in _cells(one)})

    def build_all_requests(self, **arguments: Any) -> None:
        """Make the requests of a process.

        Raises:
            RopeError: If there are more processes than documents, on which lm-eval fails.
        """
        processes = arguments.get("world_size", 1)
        documents = min(len(self.eval_docs), arguments.get("limit") or len(self.eval_docs))
        if documents < processes:
            raise RopeError(
                f"{self.config.task} has {documents} documents for {processes} processes; run "
                f"fewer, or ask for more samples."
            )
        super().build_all_requests(**arguments)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **arguments: Any) -> Instance:
        """Return what a document asks of a model."""
        common = {"doc": doc, "idx": 0, "metadata": arguments["metadata"]}
        if doc["kind"] == "loglikelihood":
            return Instance("loglikelihood", arguments=(ctx, doc["target"]), **common)
        settings = {**self.config.generation_kwargs, "max_gen_toks": doc["max_new_tokens"]}
        if doc["sampling"] is not None:
            settings |= {"do_sample": True, "temperature": doc["sampling"]["temperature"]}
            settings |= {"top_k": 0, "top_p": 1.0, "seed": _seed(doc)}
        return Instance("generate_until", arguments=(ctx, settings), **common)

    def apply_filters(self) -> None:
        """Keep every response: several where a document is sampled."""
        for instance in self.instances:
            instance.filtered_resps["none"] = instance.resps

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the scores of a document, and for every cell where it belongs.

        Every document gives every metric: lm-eval loses those that the first process has not.
        """
        if doc["kind"] == "loglikelihood":
            log_likelihood, greedy = results[0][0]
            scores = {"score": float(greedy), "nll": -log_likelihood / doc["targets"]}
        else:
            # the last request of a process may have been run again to keep processes in step
            texts = results[0][: self.config.repeats]
            scores = score(doc["task"], doc, texts if doc["sampling"] else texts[0])
        own = _cells(doc)
        found: dict[str, Any] = dict(scores)
        for cell in self._cells:
            found[f"score@{cell}"] = (cell in own, scores["score"])
        return found

    def aggregation(self) -> "Aggregations":
        """Return how the scores of documents become a number, by the name of the score."""
        return Aggregations(frozenset(self._cells))

    def higher_is_better(self) -> dict[str, bool]:
        """Return for each kind of score whether more is better."""
        return {"score": True, "nll": False, **{f"score@{cell}": True for cell in self._cells}}


class RopeTextTask(RopeTask):
    """A perplexity of the text that the setting ``text`` names, one number for each length.

    Its windows are tokens, so a `RopeHFLM` has to be asked.
    """

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Read the text; each document is a length."""
        metadata = self.config.metadata
        settings = read_settings(metadata, ["text", *TEXT_OPTIONS[self.config.dataset_name]])
        path = settings.options.pop("text", None)
        if path is None:
            raise RopeError(
                f'{self.config.task} needs a long text: --metadata \'{{"text": "FILE"}}\'.'
            )
        bench = Bench(
            tokenizer=settings.tokenizer,
            text=read_text(Path(path)),
            longest=max(settings.lengths),
            trained=trained_length(metadata),
        )
        self._measure = make_measure(self.config.dataset_name, settings.options, bench)
        lengths = self._measure.lengths(settings.lengths)
        self._measure.check(lengths)
        self._cells = [str(length) for length in lengths]
        documents = [{"length": length, "prompt": "", "target": ""} for length in lengths]
        self.dataset = {self.config.test_split: Documents(documents)}
        self.config.metadata = settings.recorded(metadata)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **arguments: Any) -> Instance:
        """Return the request for a length; it holds what to call with model and batch size."""
        measure, length = self._measure, doc["length"]

        def run(model: nn.Module, size: int) -> dict[str, Any]:
            return measure.measure(model, length, size, lambda samples: None)

        label = f"{self.config.task}@{length}"
        return Instance(
            "measured", doc, (label, length, run), idx=0, metadata=arguments["metadata"]
        )

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return every number of a length, under the name of every length."""
        numbers = {
            name: value for name, value in results[0][0].items() if not isinstance(value, list)
        }
        return {
            f"{name}@{cell}": (cell == str(doc["length"]), value)
            for name, value in numbers.items()
            for cell in self._cells
        }

    def higher_is_better(self) -> dict[str, bool]:
        """Return for each number whether more is better."""
        names = (self._measure.metric, "nll")
        return {f"{name}@{cell}": False for name in names for cell in self._cells}


@dataclass(frozen=True)
class Aggregations:
    """By the name of a metric, the function from its values to a number.

    Args:
        cells: Names of cells.
    """

    cells: frozenset[str]

    def __getitem__(self, metric: str) -> Callable[[Iterable[Any]], float]:
        """Return a cell's mean for ``score@CELL``, else the mean of all documents."""
        return _mean_of_cell if metric.rpartition("@")[2] in self.cells else mean


def task_manager(lm: Any, **metadata: Any) -> TaskManager:
    """Return what ``simple_evaluate`` finds our tasks with, for a model in memory.

    Args:
        lm: A `RopeHFLM`.
        **metadata: Settings of the tasks, as `RopeTask` takes them.
    """
    known = {"tokenizer": lm.tokenizer, "trained_length": trained_length_of(lm.model)}
    return TaskManager(
        include_path=str(TASK_DIRECTORY), include_defaults=False, metadata={**known, **metadata}
    )


def _mean_of_cell(values: Iterable[tuple[bool, float | None]]) -> float:
    inside = [one for belongs, one in values if belongs and one is not None]
    return float(mean(inside)) if inside else math.nan


def _cells(document: Mapping[str, Any]) -> list[str]:
    """Return the names of the cells a document counts in: of its length, and of its place there."""
    place = document["group"] if document["depth"] is None else document["depth"]
    length = str(document["length"])
    return [length] if place is None else [length, f"{length}/{place}"]


def _seed(document: Mapping[str, Any]) -> int:
    return int(document["metadata"]["seed"]) * 1_000_003 + int(document["index"])

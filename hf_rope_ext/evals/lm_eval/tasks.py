"""Our tasks for lm-eval: the classes that the YAML files of ``eval_tasks`` refer to."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals import fingerprint
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.documents import build_dataset, make_document_task, score
from hf_rope_ext.evals.lm_eval.metadata import (
    for_task,
    read_settings,
    trained_length,
)
from hf_rope_ext.evals.measures import make_measure
from hf_rope_ext.evals.registry import TASKS, option_names
from hf_rope_ext.evals.tasks.base import DocumentTask, TextTask
from hf_rope_ext.evals.text import encode_pair, read_text

TASK_DIRECTORY = Path(str(files("hf_rope_ext.eval_tasks")))
"""Directory for lm-eval's ``include_path``."""

KNOWN = [
    name
    for name, task in TASKS.items()
    if name.startswith("rope_") and isinstance(task, DocumentTask | TextTask)
]
"""The tasks that lm-eval can run; it has no route for images."""


class Documents(list[dict[str, Any]]):
    """A split as lm-eval reads it; a ``datasets.Dataset`` would force all fields to one type."""

    @property
    def features(self) -> dict[str, None]:
        """The fields that a YAML file may refer to."""
        return dict.fromkeys(self[0])


class RopeTask(ConfigurableTask):  # type: ignore[misc]
    """The document task of `hf_rope_ext.evals.registry` that ``dataset_name`` names.

    lm-eval's metadata holds its settings: ``lengths`` (in tokens or, as in ``"1x,4x"``, relative to
    the trained length), ``samples`` per length and depth, ``seed``, ``tokenizer``, and the task's
    options. Settings nested under the name of a task apply to that task only.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = {key: value for key, value in config.items() if key != "class"}
        settings["metadata"] = for_task(config["metadata"], config["dataset_name"], KNOWN)
        super().__init__(config=settings)

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Build the documents."""
        name = self.config.dataset_name
        settings = read_settings(self.config.metadata, option_names(TASKS[name]))
        self._task = make_document_task(name, **settings.options)
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
                question = document["prompt"] + document["answer"]
                _, targets = encode_pair(settings.tokenizer, question, document["target"])
                document["targets"] = targets
        self.dataset = {self.config.test_split: documents}
        sampling = documents[0]["sampling"]
        self.config.repeats = 1 if sampling is None else sampling["n"]
        self.config.metadata = settings.record(self.config.metadata)
        self._cells = sorted({cell for document in documents for cell in _cells(document)})

    def build_all_requests(self, **arguments: Any) -> None:
        """Build the requests of a process.

        Raises:
            RopeError: If there are more processes than documents, which makes lm-eval fail.
        """
        processes = arguments.get("world_size", 1)
        documents = min(len(self.eval_docs), arguments.get("limit") or len(self.eval_docs))
        if documents < processes:
            raise RopeError(
                f"{self.config.task} has {documents} documents for {processes} processes; use "
                f"fewer processes, or more samples."
            )
        super().build_all_requests(**arguments)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **arguments: Any) -> Instance:
        """Return the request of a document."""
        common = {"doc": doc, "idx": 0, "metadata": arguments["metadata"]}
        if doc["kind"] == "loglikelihood":
            return Instance("loglikelihood", arguments=(ctx, doc["target"]), **common)
        settings = {**self.config.generation_kwargs, "max_gen_toks": doc["max_new_tokens"]}
        if doc["sampling"] is not None:
            settings |= {"do_sample": True, "temperature": doc["sampling"]["temperature"]}
            settings |= {"top_k": 0, "top_p": 1.0, "seed": _seed(doc)}
        return Instance("generate_until", arguments=(ctx, settings), **common)

    def apply_filters(self) -> None:
        """Keep every response, including repeated samples."""
        for instance in self.instances:
            instance.filtered_resps["none"] = instance.resps

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the scores of a document, and for every cell whether it belongs there.

        Every document returns every metric: lm-eval drops those missing in the first process.
        """
        if doc["kind"] == "loglikelihood":
            log_likelihood, greedy = results[0][0]
            scores = {"score": float(greedy), "nll": -log_likelihood / doc["targets"]}
        else:
            # lm-eval may repeat the last request of a process to keep processes in step
            texts = results[0][: self.config.repeats]
            scores = score(self._task, doc, texts if doc["sampling"] else texts[0])
        member_of = _cells(doc)
        by_cell = {f"score@{cell}": (cell in member_of, scores["score"]) for cell in self._cells}
        return {**scores, **by_cell}

    def aggregation(self) -> "Aggregations":
        """Return the aggregation of each metric, by name."""
        return Aggregations(frozenset(self._cells))

    def higher_is_better(self) -> dict[str, bool]:
        """Return for each metric whether higher is better."""
        return {"score": True, "nll": False, **{f"score@{cell}": True for cell in self._cells}}


class RopeTextTask(RopeTask):
    """A perplexity of the file given by the setting ``text``, with one result per length.

    Windows are cut in tokens, so the model must be a `RopeHFLM`.
    """

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Read the text; each length is a document."""
        metadata = self.config.metadata
        options = option_names(TASKS[self.config.dataset_name])
        settings = read_settings(metadata, ["text", *options])
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
        self.config.metadata = settings.record(metadata)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **arguments: Any) -> Instance:
        """Return the request for a length: a function of the model and the batch size."""
        measure, length = self._measure, doc["length"]

        def run(model: nn.Module, size: int) -> dict[str, Any]:
            return measure.run(model, length, size, lambda samples: None)

        label = f"{self.config.task}@{length}"
        return Instance(
            "measured", doc, (label, length, run), idx=0, metadata=arguments["metadata"]
        )

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return every result of a length, under the name of every length."""
        numbers = {
            name: value for name, value in results[0][0].items() if not isinstance(value, list)
        }
        return {
            f"{name}@{cell}": (cell == str(doc["length"]), value)
            for name, value in numbers.items()
            for cell in self._cells
        }

    def higher_is_better(self) -> dict[str, bool]:
        """Return for each metric whether higher is better."""
        names = (self._measure.metric, "nll")
        return {f"{name}@{cell}": False for name in names for cell in self._cells}


@dataclass(frozen=True)
class Aggregations:
    """Aggregation functions by metric name.

    Args:
        cells: Names of cells.
    """

    cells: frozenset[str]

    def __getitem__(self, metric: str) -> Callable[[Iterable[Any]], float]:
        """Return the mean of a cell for ``score@CELL``, else the mean of all documents."""
        return _mean_of_cell if metric.rpartition("@")[2] in self.cells else mean


def task_manager(lm: Any, **metadata: Any) -> TaskManager:
    """Return the task manager to pass to ``simple_evaluate`` with a model in memory.

    Args:
        lm: A `RopeHFLM`.
        **metadata: Settings of the tasks; see `RopeTask`.
    """
    known = {"tokenizer": lm.tokenizer, "trained_length": fingerprint.trained_length(lm.model)}
    return TaskManager(
        include_path=str(TASK_DIRECTORY), include_defaults=False, metadata={**known, **metadata}
    )


def _mean_of_cell(values: Iterable[tuple[bool, float | None]]) -> float:
    inside = [value for belongs, value in values if belongs and value is not None]
    return float(mean(inside)) if inside else math.nan


def _cells(document: Mapping[str, Any]) -> list[str]:
    """Return the cells that a document belongs to: its length, and its depth or group there."""
    place = document["group"] if document["depth"] is None else document["depth"]
    length = str(document["length"])
    return [length] if place is None else [length, f"{length}/{place}"]


def _seed(document: Mapping[str, Any]) -> int:
    return int(document["metadata"]["seed"]) * 1_000_003 + int(document["index"])

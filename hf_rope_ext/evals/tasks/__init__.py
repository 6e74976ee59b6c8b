"""Tasks of pure data: builders of questions that fit a length exactly, and pure scorers."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.babi import Babi
from hf_rope_ext.evals.tasks.base import Task, build
from hf_rope_ext.evals.tasks.chain import Chain
from hf_rope_ext.evals.tasks.kv import KeyValue
from hf_rope_ext.evals.tasks.needle import Needle
from hf_rope_ext.evals.tasks.numbers import Arithmetic, ItemSequence
from hf_rope_ext.evals.tasks.passkey import Passkey, TeacherForcedPasskey
from hf_rope_ext.evals.tasks.ruler_needle import NEEDLE_TASKS
from hf_rope_ext.evals.tasks.ruler_qa import RulerQA
from hf_rope_ext.evals.tasks.ruler_words import CommonWords, FrequentWords, VariableTracking

AnyTask = TypeVar("AnyTask", bound=Task)

RULER: dict[str, Task] = {
    **NEEDLE_TASKS,
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": RulerQA(layout="squad"),
    "qa_2": RulerQA(layout="hotpotqa"),
}
"""The 13 tasks of RULER by the names of its own configuration."""

TASKS: dict[str, Task] = {
    "rope_passkey": Passkey(),
    "rope_passkey_ll": TeacherForcedPasskey(),
    "rope_needle": Needle(),
    "rope_needle_multi": Needle(needles=4, max_new_tokens=96),
    "rope_kv": KeyValue(),
    **{f"rope_ruler_{name}": task for name, task in RULER.items()},
    "rope_add": Arithmetic(),
    "rope_compare": Arithmetic(operation="compare"),
    "rope_copy": ItemSequence(),
    "rope_sort": ItemSequence(operation="sort"),
    **{f"rope_babi_qa{facts}": Babi(facts=facts) for facts in (1, 2, 3)},
    "rope_cot_chain": Chain(),
    "rope_cot_chain_cot": Chain(mode="cot", max_new_tokens=160),
    "rope_cot_chain_maj": Chain(mode="maj", max_new_tokens=160),
}
"""Every task of documents, by name, with its options at their defaults."""


def build_dataset(
    task_name: str,
    tokenizer: Any,
    lengths: Sequence[int],
    samples: int = 10,
    seed: int = 42,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the documents of a task, as plain data.

    A length is the whole budget: special tokens, ``template_tokens``, prompt, the beginning of the
    answer, and either ``max_new_tokens`` or, where the task is teacher-forced, the target. Lengths,
    depths and samples are interleaved, so that the first n documents cover every length. The same
    arguments always give the same documents.

    Args:
        task_name: Of `TASKS`, such as ``"rope_passkey"``.
        tokenizer: The tokenizer of the model that is asked.
        lengths: In tokens.
        samples: Documents per length and, for a task with depths, per depth.
        seed: Of everything drawn.
        **options: The task's own, ``depths`` or ``haystack`` for example, and ``template_tokens``,
            the tokens a chat template adds.

    Returns:
        One dict per document: ``task``, ``length``, ``index``, ``depth`` (0 to 1, None where the
        task has none), ``group`` (of documents reported together, or None), ``kind``
        (``"generate"`` or ``"loglikelihood"``), ``prompt``, ``answer`` (the beginning of the
        answer, which goes after the prompt, or after the assistant's header of a chat template),
        ``target`` (what a teacher-forced model is scored on, after ``prompt + answer``), ``gold``
        (list of str), ``max_new_tokens``, ``tokens`` (of special tokens, prompt and answer),
        ``sampling`` (None for greedy, else ``{"n": ..., "temperature": ...}``), and ``metadata``.

    Raises:
        RopeError: If the task or an option is unknown, or a length has no room for the task.
    """
    if samples < 1:
        raise RopeError(f"samples must be at least 1, got {samples!r}.")
    task = make_task(task_name, **options)
    return list(build(task_name, task, tokenizer, [int(one) for one in lengths], samples, seed))


def score(
    task_name: str, doc: Mapping[str, Any], prediction: str | Sequence[str]
) -> dict[str, float]:
    """Return the scores of one prediction; ``"score"``, between 0 and 1, is always there.

    Args:
        task_name: Of `TASKS`.
        doc: What `build_dataset` returned.
        prediction: The text generated after ``prompt + answer``; a list of them where the document
            asks for several samples.

    Raises:
        RopeError: If the task is unknown.
    """
    task, gold = _named(task_name), tuple(doc["gold"])
    if isinstance(prediction, str):
        return task.score(gold, prediction)
    return task.score_samples(gold, list(prediction))


def make_task(task_name: str, **options: Any) -> Task:
    """Return a task with options of its own.

    Args:
        task_name: Of `TASKS`.
        **options: Fields of the task; lists become tuples.

    Raises:
        RopeError: If the task or an option is unknown, or an option is out of range.
    """
    return with_options(task_name, _named(task_name), options)


def with_options(task_name: str, task: AnyTask, options: dict[str, Any]) -> AnyTask:
    """Return a task with other options.

    Raises:
        RopeError: As `make_task`.
    """
    known = [field.name for field in fields(task)]
    for option in options:
        if option not in known:
            raise RopeError(
                f"{task_name} has no option {option!r}.{_nearest(option, known)} Options: "
                f"{', '.join(known)}."
            )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    made = replace(task, **values)
    made.check()
    return made


def require_known(task_name: str, known: Sequence[str]) -> None:
    """Check the name of a task.

    Raises:
        RopeError: If it is unknown; the message names the nearest.
    """
    if task_name not in known:
        raise RopeError(
            f"unknown task {task_name!r}.{_nearest(task_name, known)} Known: {', '.join(known)}."
        )


def _named(task_name: str) -> Task:
    require_known(task_name, list(TASKS))
    return TASKS[task_name]


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {found[0]!r}?" if found else ""

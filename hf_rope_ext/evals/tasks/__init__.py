"""Tasks of pure data: builders of questions that fit a length exactly, and pure scorers."""

from collections.abc import Mapping, Sequence
from typing import Any


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
    raise NotImplementedError


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
    raise NotImplementedError

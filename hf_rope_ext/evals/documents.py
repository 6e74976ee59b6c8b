"""Build questions that fill a context length exactly, and score answers to them."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.registry import make_task
from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Place
from hf_rope_ext.evals.text import encode, require_answer

Document = dict[str, Any]


def build_dataset(
    task_name: str,
    tokenizer: Any,
    lengths: Sequence[int],
    samples: int = 10,
    seed: int = 42,
    **options: Any,
) -> list[Document]:
    """Return the documents of a task, as plain data.

    A length is the total budget: special tokens, ``template_tokens``, prompt, the opening of the
    answer, and either ``max_new_tokens`` or, for teacher-forced tasks, the target. Lengths, depths
    and samples are interleaved, so that the first n documents cover every length. The same
    arguments always give the same documents.

    Args:
        task_name: A task of documents, such as ``"rope_passkey"``.
        tokenizer: The tokenizer of the model under test.
        lengths: Context lengths in tokens.
        samples: Documents per length and, for tasks with depths, per depth.
        seed: Seed for all sampling.
        **options: Options of the task, such as ``depths``, ``haystack`` or ``template_tokens``
            (tokens that a chat template adds).

    Returns:
        One dict per document: ``task``, ``length``, ``index``, ``depth`` (0 to 1, None without
        depths), ``group`` (label of a subset reported separately, or None), ``kind``
        (``"generate"`` or ``"loglikelihood"``), ``prompt``, ``answer`` (opening of the answer,
        appended to the prompt or to the assistant header of a chat template), ``target``
        (teacher-forced continuation of ``prompt + answer``), ``gold`` (list of str),
        ``max_new_tokens``, ``tokens`` (special tokens, prompt and answer), ``sampling`` (None for
        greedy, else ``{"n": ..., "temperature": ...}``), and ``metadata``.

    Raises:
        RopeError: If the task or an option is unknown, or a length is too short for the task.
    """
    require_integer("samples", samples, 1)
    task = make_document_task(task_name, **options)
    return list(build(task_name, task, tokenizer, [int(n) for n in lengths], samples, seed))


def score(
    task: DocumentTask, document: Mapping[str, Any], prediction: str | Sequence[str]
) -> dict[str, float]:
    """Return the scores of one prediction, always including ``"score"`` between 0 and 1.

    Args:
        task: The task, with the options that the document was built with.
        document: A document from `build_dataset`.
        prediction: The text generated after ``prompt + answer``, or a list of texts for documents
            with ``sampling``.
    """
    gold = tuple(document["gold"])
    if isinstance(prediction, str):
        return task.score(gold, prediction)
    return task.score_samples(gold, list(prediction))


def make_document_task(name: str, **options: Any) -> DocumentTask:
    """Return a task of documents with some options changed.

    Raises:
        RopeError: If the task or an option is unknown, or the task has no documents.
    """
    task = make_task(name, **options)
    if not isinstance(task, DocumentTask):
        raise RopeError(f"{name} has no text documents; measure it with `evaluate` or `compare`.")
    return task


def build(
    name: str, task: DocumentTask, tokenizer: Any, lengths: list[int], samples: int, seed: int
) -> Iterator[Document]:
    """Yield the documents of a task, with lengths and depths interleaved."""
    guesses: dict[tuple[int, str | None], int] = {}
    for index in range(samples):
        for depth, group in task.cells():
            for length in lengths:
                place = Place(length, depth, group, index)
                key = (length, group)
                guess = guesses.get(key, length // 16)
                document = _largest_document(name, task, tokenizer, place, seed, guess)
                guesses[key] = document["metadata"]["size"]
                yield document


def _largest_document(
    name: str, task: DocumentTask, tokenizer: Any, place: Place, seed: int, guess: int
) -> Document:
    """Return the largest document that fits the length."""
    stream = f"{seed}/{name}/{place.length}/{place.depth}/{place.group}/{place.index}"

    def at(size: int) -> Draft:
        return task.draft(random.Random(stream), size, place)

    def tokens(size: int) -> int:
        return _needed(task, tokenizer, at(size))

    size = fit(tokens, place.length, (task.smallest, task.largest(place)), guess)
    if size is None:
        raise RopeError(
            f"{name}: a length of {place.length} is too short for the task, which takes at least "
            f"{tokens(task.smallest)} tokens with this tokenizer, answer included."
        )
    draft = at(size)
    for answer in draft.gold:
        require_answer(tokenizer, answer, name)
    return {
        "task": name,
        "length": place.length,
        "index": place.index,
        "depth": place.depth,
        "group": place.group,
        "kind": task.kind,
        "prompt": draft.prompt,
        "answer": draft.answer,
        "target": draft.target,
        "gold": list(draft.gold),
        "max_new_tokens": task.max_new_tokens,
        "tokens": len(encode(tokenizer, draft.prompt + draft.answer)),
        "sampling": task.sampling,
        "metadata": {"seed": seed, "size": size, **draft.metadata},
    }


def _needed(task: DocumentTask, tokenizer: Any, draft: Draft) -> int:
    """Return the tokens that a draft takes, including its answer and a chat template."""
    question = draft.prompt + draft.answer
    if task.kind == "loglikelihood":
        return task.template_tokens + len(encode(tokenizer, question + draft.target))
    return task.template_tokens + len(encode(tokenizer, question)) + task.max_new_tokens


def fit(
    tokens: Callable[[int], int], budget: int, limits: tuple[int, int], guess: int
) -> int | None:
    """Return a size that fits such that one more unit does not, or the largest size if it fits.

    Binary search whose first steps interpolate the token count.

    Args:
        tokens: Token count as a function of the size.
        budget: Maximum number of tokens.
        limits: Smallest and largest size.
        guess: Size to start near.

    Returns:
        The size; None if the smallest does not fit.
    """
    smallest, largest = limits
    low, low_tokens = smallest, tokens(smallest)
    if low_tokens > budget:
        return None
    high = largest + 1
    size = min(max(guess, smallest + 1), largest)
    for step in range(200):
        if high - low <= 1:
            break
        used = tokens(size)
        if used > budget:
            high = size
        else:
            low = size
        if size > smallest and used > low_tokens and step < 8:
            unit = (used - low_tokens) / (size - smallest)
            size = smallest + int((budget - low_tokens) / unit)
        else:
            size = (low + high) // 2 if high <= largest else 2 * low + 1
        size = min(max(size, low + 1), max(high - 1, low + 1))
    return low

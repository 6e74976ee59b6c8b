"""Answer documents by teacher forcing or generation, running shared prefixes only once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.bench import Advance
from hf_rope_ext.evals.documents import Document, score
from hf_rope_ext.evals.generation import answer_config, padding, without_habits
from hf_rope_ext.evals.scoring import keeps_logits, score_last
from hf_rope_ext.evals.tasks.base import DocumentTask
from hf_rope_ext.evals.text import encode, encode_pair
from hf_rope_ext.models.host import new_cache, pass_cache
from hf_rope_ext.rotary.installed import patch_of

PREFILL = 4096
"""Chunk size in tokens for filling a cache."""

WORTH_KEEPING = 0.125
"""Minimum fraction of a row that a shared prefix must cover: attention to a cache is masked, not
causal, and costs up to twice as much."""

Result = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A tokenized document.

    Args:
        document: The document.
        task: Its task, which scores answers.
        ids: All tokens, including a teacher-forced target.
        targets: Number of target tokens at the end; 0 if the answer is generated.
    """

    document: Document
    task: DocumentTask
    ids: list[int]
    targets: int


def answer(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    size: int,
    advance: Advance,
) -> list[Result]:
    """Return the scores of each document, in order.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Tokenized documents.
        size: Maximum batch size.
        advance: Called with the number of documents just finished.
    """
    results: dict[int, Result] = {}
    order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
    shared = (
        SharedPrefix(model) if _worth_sharing([rows[index].ids for index in order], size) else None
    )
    if shared is not None and shared.usable:
        for index in order:
            results[index] = _answer_with_prefix(shared, tokenizer, rows[index])
            advance(1)
    else:
        for batch in _batches(rows, size, padded=has_fixed_frequencies(model)):
            answers = _answer_batch(model, tokenizer, [rows[index] for index in batch])
            results.update(zip(batch, answers, strict=True))
            advance(len(batch))
    return [results[index] for index in range(len(rows))]


class SharedPrefix:
    """A cache that keeps the prefix that a row shares with the previous one.

    If frequencies are the same for every request, keys and values of a prefix do not depend on what
    follows. With rows in lexicographic order, every shared prefix runs only once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ids: list[int] = []
        self.cache: Any = None
        self.usable = has_fixed_frequencies(model) and keeps_logits(model) and self._renew()

    def fill(self, ids: list[int], last: int) -> Tensor:
        """Run a row and return the logits of its last positions, ``(last, vocabulary)``."""
        kept = min(_common(ids, self.ids), len(ids) - last)
        if kept < WORTH_KEEPING * len(ids):
            kept = 0
        self.crop(kept)
        device = next(self.model.parameters()).device
        rest = torch.tensor([ids[kept:]], device=device)
        cached = pass_cache(self.model, self.cache)
        while rest.shape[1] - last > PREFILL:
            piece, rest = rest[:, :PREFILL], rest[:, PREFILL:]
            self.model(input_ids=piece, logits_to_keep=1, **cached)
        output = self.model(input_ids=rest, logits_to_keep=last, **cached)
        self.ids = ids
        return output.logits[0]  # type: ignore[no-any-return]

    def crop(self, length: int) -> None:
        """Keep only the first tokens."""
        self.ids = self.ids[:length]
        if length == 0:
            self._renew()
        elif (removed := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-removed)

    def _renew(self) -> bool:
        """Start an empty cache; return whether it can be cropped to any length."""
        from transformers import PreTrainedModel

        inner = next((p for p in self.model.modules() if isinstance(p, PreTrainedModel)), None)
        if inner is None:
            return False
        self.cache = new_cache(inner.config)
        return all(type(layer).__name__ == "DynamicLayer" for layer in self.cache.layers)


def has_fixed_frequencies(model: nn.Module) -> bool:
    """Return whether RoPE frequencies are independent of the request length."""
    patch = patch_of(model)
    if patch is not None:
        return not patch.method.length_dependent
    config = getattr(model, "config", None)
    if config is None:
        return False
    return not {"dynamic", "longrope"} & _rope_types(config.get_text_config().to_dict())


def _rope_types(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    types = {str(value[key]) for key in ("rope_type", "type") if key in value}
    return types.union(*(_rope_types(part) for part in value.values()))


def to_row(tokenizer: Any, document: Document, task: DocumentTask) -> Row:
    """Return a document from `build_dataset` as tokens.

    Raises:
        RopeError: If it exceeds the length it was built for, due to a different tokenizer.
    """
    question = document["prompt"] + document["answer"]
    if document["kind"] == "loglikelihood":
        ids, targets = encode_pair(tokenizer, question, document["target"])
        needed = len(ids)
    else:
        ids, targets = encode(tokenizer, question), 0
        needed = len(ids) + document["max_new_tokens"]
    if needed > document["length"]:
        raise RopeError(
            f"a document of {document['task']} takes {needed} tokens, more than its length of "
            f"{document['length']}; it was built for another tokenizer."
        )
    return Row(document, task, ids, targets)


def _worth_sharing(ordered: list[list[int]], size: int) -> bool:
    """Return whether sharing prefixes saves more than batching."""
    total = sum(map(len, ordered))
    saved = sum(_common(previous, row) for previous, row in pairwise(ordered))
    return saved > total * (0.05 if size == 1 else 0.25)


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two rows."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _batches(rows: Sequence[Row], size: int, padded: bool) -> Iterator[list[int]]:
    """Yield the indices of the rows of each batch, longest first.

    Without padding, all rows of a batch have the same length: padding would lengthen a row for
    methods whose frequencies depend on it.
    """
    groups: dict[tuple[int, bool, int], list[int]] = {}
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].ids)):
        row = rows[index]
        width = 0 if padded else len(row.ids)
        key = (width, bool(row.targets), row.document["max_new_tokens"])
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        # sampled documents are seeded one by one, so each is its own batch
        step = 1 if rows[group[0]].document["sampling"] else size
        for first in range(0, len(group), step):
            yield group[first : first + step]


@torch.inference_mode()
def _answer_with_prefix(shared: SharedPrefix, tokenizer: Any, row: Row) -> Result:
    if row.targets:
        logits = shared.fill(row.ids, row.targets + 1)[:-1].float()
        wanted = torch.tensor(row.ids[-row.targets :], device=logits.device)
        log_probs = torch.log_softmax(logits, dim=-1).gather(-1, wanted[:, None])
        greedy = logits.argmax(-1) == wanted
        return score_target(log_probs.double().cpu(), greedy.cpu())
    shared.fill(row.ids, 1)
    # generate runs the last token again
    shared.crop(len(row.ids) - 1)
    texts = _generate(shared.model, tokenizer, [row], shared.cache)[0]
    shared.crop(len(row.ids) - 1)
    return _judge(row, texts)


@torch.inference_mode()
def _answer_batch(model: nn.Module, tokenizer: Any, rows: list[Row]) -> list[Result]:
    if not rows[0].targets:
        texts = _generate(model, tokenizer, rows)
        return [_judge(row, answers) for row, answers in zip(rows, texts, strict=True)]
    width = max(len(row.ids) for row in rows)
    # padding after the end of a row is invisible to it
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    begins = [len(row.ids) - row.targets - 1 for row in rows]
    scores = score_last(model, ids, width - min(begins) - 1)
    results = []
    for index, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        first = begin - min(begins)
        target = slice(first, first + row.targets)
        results.append(score_target(scores.log_probs[index, target], scores.greedy[index, target]))
    return results


def score_target(log_probs: Tensor, greedy: Tensor) -> Result:
    """Return a score of 1 if every target token is the most likely one, and the mean loss."""
    return {
        "score": float(greedy.all()),
        "token_accuracy": float(greedy.double().mean()),
        "nll": -float(log_probs.mean()),
    }


def _judge(row: Row, texts: list[str]) -> Result:
    return score(row.task, row.document, texts if row.document["sampling"] else texts[0])


def _generate(
    model: nn.Module, tokenizer: Any, rows: list[Row], cache: Any = None
) -> list[list[str]]:
    """Return the generated texts of each row: several if sampling."""
    document = rows[0].document
    sampling = document["sampling"]
    count = sampling["n"] if sampling else 1
    settings: dict[str, Any] = {"num_return_sequences": count}
    if sampling:
        settings |= {"do_sample": True, "temperature": sampling["temperature"], "top_k": 0}
    width = max(len(row.ids) for row in rows)
    pad = padding(tokenizer)
    device = next(model.parameters()).device
    left = [[pad] * (width - len(row.ids)) + row.ids for row in rows]
    ids = torch.tensor(left, device=device)
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    cached = {} if cache is None else pass_cache(model, cache)
    if cache is not None and count > 1:
        cache.batch_repeat_interleave(count)
    config = answer_config(model, tokenizer, max_new_tokens=document["max_new_tokens"], **settings)
    with _seeded(document, device), without_habits(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask.to(device),
            generation_config=config,
            **cached,
        )
    if cache is not None and count > 1:
        cache.batch_select_indices(torch.tensor([0], device=device))
    new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [new[first : first + count] for first in range(0, len(new), count)]


@contextmanager
def _seeded(document: Document, device: torch.device) -> Iterator[None]:
    """Seed sampling by the document alone, and restore the global generators afterwards."""
    if not document["sampling"]:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(document["metadata"]["seed"] * 1_000_003 + document["index"])
        yield

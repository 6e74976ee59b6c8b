"""Let a model answer documents: teacher-forced or generated, with shared beginnings run once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.scoring import keeps_logits, score_last
from hf_rope_ext.evals.tasks import score
from hf_rope_ext.evals.text import encode, encode_pair
from hf_rope_ext.rotary.installed import patch_of

PREFILL = 4096
"""Tokens of a prompt that go through the layers at once where a cache is filled."""

WORTH_KEEPING = 0.125
"""Share of a row that a shared beginning must be: attention to a cache is masked, not causal, and
costs up to twice as much."""

Document = dict[str, Any]
Result = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One document as tokens.

    Args:
        document: Where it comes from.
        ids: All its tokens, a teacher-forced target included.
        targets: How many at the end are the target; 0 where the answer is generated.
    """

    document: Document
    ids: list[int]
    targets: int


def answer(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    size: int,
    advance: Callable[[int], None],
) -> list[Result]:
    """Return the scores of each document, in order.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Documents as tokens.
        size: Rows of a batch at most.
        advance: Told of every few documents done.
    """
    found: dict[int, Result] = {}
    order = sorted(range(len(rows)), key=lambda number: rows[number].ids)
    shared = Shared(model) if _worth_sharing([rows[number].ids for number in order], size) else None
    if shared is not None and shared.usable:
        for number in order:
            found[number] = _with_shared(shared, tokenizer, rows[number])
            advance(1)
    else:
        for batch in _alike(rows, size, padded=fixed_frequencies(model)):
            results = _plain(model, tokenizer, [rows[number] for number in batch])
            found.update(zip(batch, results, strict=True))
            advance(len(batch))
    return [found[number] for number in range(len(rows))]


class Shared:
    """A cache that keeps what a row and the one before it have in common.

    With frequencies that are the same for every request, keys and values of a beginning do not
    depend on what follows. Rows in alphabetical order run every shared beginning once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ids: list[int] = []
        self.cache: Any = None
        self.usable = fixed_frequencies(model) and keeps_logits(model) and self._renew()

    def fill(self, ids: list[int], last: int) -> Tensor:
        """Run a row and return the logits of its last positions, ``(last, vocabulary)``."""
        begun = min(_common(ids, self.ids), len(ids) - last)
        if begun < WORTH_KEEPING * len(ids):
            begun = 0
        self.crop(begun)
        device = next(self.model.parameters()).device
        rest = torch.tensor([ids[begun:]], device=device)
        while rest.shape[1] - last > PREFILL:
            piece, rest = rest[:, :PREFILL], rest[:, PREFILL:]
            self.model(input_ids=piece, past_key_values=self.cache, logits_to_keep=1)
        found = self.model(input_ids=rest, past_key_values=self.cache, logits_to_keep=last)
        self.ids = ids
        return found.logits[0]  # type: ignore[no-any-return]

    def crop(self, length: int) -> None:
        """Keep the first tokens only."""
        self.ids = self.ids[:length]
        if length == 0:
            self._renew()
        elif (removed := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-removed)

    def _renew(self) -> bool:
        """Begin an empty cache; return whether it can be cut back to any length."""
        from transformers import DynamicCache, PreTrainedModel

        inner = next((p for p in self.model.modules() if isinstance(p, PreTrainedModel)), None)
        if inner is None:
            return False
        self.cache = DynamicCache(config=inner.config)
        return all(type(layer).__name__ == "DynamicLayer" for layer in self.cache.layers)


def fixed_frequencies(model: nn.Module) -> bool:
    """Return whether a token's keys are the same whatever the length of its request."""
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
    own = {str(value[key]) for key in ("rope_type", "type") if key in value}
    return own.union(*(_rope_types(part) for part in value.values()))


def to_row(tokenizer: Any, document: Document) -> Row:
    """Return a document, one that `hf_rope_ext.evals.tasks.build_dataset` returned, as tokens.

    Raises:
        RopeError: If it is longer than it was built for: another tokenizer.
    """
    asked = document["prompt"] + document["answer"]
    if document["kind"] == "loglikelihood":
        ids, targets = encode_pair(tokenizer, asked, document["target"])
        needed = len(ids)
    else:
        ids, targets = encode(tokenizer, asked), 0
        needed = len(ids) + document["max_new_tokens"]
    if needed > document["length"]:
        raise RopeError(
            f"a document of {document['task']} takes {needed} tokens, more than its length "
            f"{document['length']}; it was built for another tokenizer."
        )
    return Row(document, ids, targets)


def _worth_sharing(ordered: list[list[int]], size: int) -> bool:
    """Return whether shared beginnings save more than batches do."""
    total = sum(map(len, ordered))
    saved = sum(_common(one, two) for one, two in pairwise(ordered))
    return saved > total * (0.05 if size == 1 else 0.25)


def _common(one: list[int], two: list[int]) -> int:
    """Return how many tokens two rows begin with alike."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _alike(rows: Sequence[Row], size: int, padded: bool) -> Iterator[list[int]]:
    """Yield the numbers of rows that go in one batch, longest first.

    Without padding, rows of a batch have one length: a padded row is longer to a method whose
    frequencies follow the length.
    """
    groups: dict[tuple[int, bool, int], list[int]] = {}
    for number in sorted(range(len(rows)), key=lambda one: -len(rows[one].ids)):
        row = rows[number]
        width = 0 if padded else len(row.ids)
        key = (width, bool(row.targets), row.document["max_new_tokens"])
        groups.setdefault(key, []).append(number)
    for numbers in groups.values():
        # samples are drawn from a document's own seed, so it is a batch of its own
        rows_at_once = 1 if rows[numbers[0]].document["sampling"] else size
        for first in range(0, len(numbers), rows_at_once):
            yield numbers[first : first + rows_at_once]


@torch.inference_mode()
def _with_shared(shared: Shared, tokenizer: Any, row: Row) -> Result:
    if row.targets:
        logits = shared.fill(row.ids, row.targets + 1)[:-1].float()
        wanted = torch.tensor(row.ids[-row.targets :], device=logits.device)
        found = torch.log_softmax(logits, dim=-1).gather(-1, wanted[:, None])
        greedy = logits.argmax(-1) == wanted
        return forced(found.double().cpu(), greedy.cpu())
    shared.fill(row.ids, 1)
    # the last token is run again, by generate
    shared.crop(len(row.ids) - 1)
    texts = _generate(shared.model, tokenizer, [row], shared.cache)[0]
    shared.crop(len(row.ids) - 1)
    return _judged(row, texts)


@torch.inference_mode()
def _plain(model: nn.Module, tokenizer: Any, rows: list[Row]) -> list[Result]:
    if not rows[0].targets:
        texts = _generate(model, tokenizer, rows)
        return [_judged(row, one) for row, one in zip(rows, texts, strict=True)]
    width = max(len(row.ids) for row in rows)
    # what stands after a row's end is not seen by it
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    begins = [len(row.ids) - row.targets - 1 for row in rows]
    scores = score_last(model, ids, width - min(begins) - 1)
    results = []
    for number, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        first = begin - min(begins)
        own = slice(first, first + row.targets)
        results.append(forced(scores.log_probs[number, own], scores.greedy[number, own]))
    return results


def forced(log_probs: Tensor, greedy: Tensor) -> Result:
    """Return 1 if every token of the target is the likeliest, and how likely they are."""
    return {
        "score": float(greedy.all()),
        "token_accuracy": float(greedy.double().mean()),
        "nll": -float(log_probs.mean()),
    }


def _judged(row: Row, texts: list[str]) -> Result:
    document = row.document
    return score(document["task"], document, texts if document["sampling"] else texts[0])


def _generate(
    model: nn.Module, tokenizer: Any, rows: list[Row], cache: Any = None
) -> list[list[str]]:
    """Return the generated texts of each row: several if sampled."""
    from transformers import GenerationConfig

    document = rows[0].document
    sampling = document["sampling"]
    count = sampling["n"] if sampling else 1
    settings: dict[str, Any] = {"do_sample": False, "num_return_sequences": count}
    if sampling:
        settings |= {"do_sample": True, "temperature": sampling["temperature"], "top_k": 0}
    width = max(len(row.ids) for row in rows)
    pad = _padding(tokenizer)
    device = next(model.parameters()).device
    left = [[pad] * (width - len(row.ids)) + row.ids for row in rows]
    ids = torch.tensor(left, device=device)
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    named: dict[str, Any] = {}
    if cache is not None:
        if count > 1:
            cache.batch_repeat_interleave(count)
        named["past_key_values"] = cache
    config = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    with _seeded(document, device):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=document["max_new_tokens"],
                eos_token_id=tokenizer.eos_token_id if end is None else end,
                pad_token_id=pad,
                **settings,
            ),
            **named,
        )
    if cache is not None and count > 1:
        cache.batch_select_indices(torch.tensor([0], device=device))
    new = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [new[first : first + count] for first in range(0, len(new), count)]


def _padding(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _seeded(document: Document, device: torch.device) -> Any:
    """Make samples depend on the document alone, and leave the global generators as they were."""
    from contextlib import ExitStack

    stack = ExitStack()
    if document["sampling"]:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(document["metadata"]["seed"] * 1_000_003 + document["index"])
    return stack

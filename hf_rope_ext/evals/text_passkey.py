"""Token-level passkey retrieval: repeat five digits hidden in the user's text."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.bench import Advance, Bench
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.statistics import wilson
from hf_rope_ext.evals.tasks.base import TextTask
from hf_rope_ext.evals.text import require_answer, require_tokens, tokenize

DEPTH_BANDS = 5
"""Number of depth ranges that results are grouped by."""

SENTENCE = "\nThe pass key is {key}.\n"


@dataclass(frozen=True, kw_only=True)
class TextPasskey(TextTask):
    """Pass keys hidden in the text and scored token by token in one forward pass.

    A key counts as retrieved if each of its tokens is the most likely one given the tokens before
    it, that is, if greedy decoding would produce it. A sample, key included, has exactly the
    requested length. Keys and positions do not depend on the method, so methods can be compared
    sample by sample.

    Args:
        samples: Samples per length, at depths spread evenly from start to end; None for
            `Bench.samples`.
    """

    metric = "exact"

    samples: int | None = None

    def check(self) -> None:
        """Check the options."""
        if self.samples is not None:
            require_integer("samples", self.samples, 1)

    def require_text(self, bench: Bench) -> None:
        """Check that the text is long enough and the tokenizer can encode keys."""
        require_tokens(bench.ids, bench.longest, f"a length of {bench.longest}")
        require_answer(bench.tokenizer, "0123456789", "passkey")

    def sample(self, bench: Bench, length: int, index: int) -> tuple[Tensor, int]:
        """Return one sample, ``(length,)``, and the number of key tokens at its end.

        Raises:
            RopeError: If the length is too short for the sentence and the question.
        """
        draw = random.Random(f"{bench.seed}/{length}/{index}")
        sentence, cue, answer = draw_sentence(bench.tokenizer, draw)
        around = length - len(bench.prefix) - len(sentence) - len(cue) - len(answer)
        if around < 0:
            raise RopeError(
                f"a length of {length} is too short for the pass key sentence and its question, "
                f"which take {length - around} tokens."
            )
        first = draw.randrange(len(bench.ids) - around + 1)
        text = bench.ids[first : first + around]
        depth = round(around * (index + 0.5) / self._count(bench))
        parts = (torch.tensor(bench.prefix), text[:depth], sentence, text[depth:], cue, answer)
        return torch.cat([part.long() for part in parts]), len(answer)

    def batches(
        self, bench: Bench, length: int, size: int
    ) -> Iterator[tuple[Tensor, int, list[int]]]:
        """Yield batches of samples, the token count of their keys, and their indices."""
        groups: dict[int, list[tuple[Tensor, int]]] = {}
        for index in range(self._count(bench)):
            row, targets = self.sample(bench, length, index)
            groups.setdefault(targets, []).append((row, index))
        for targets, rows in sorted(groups.items()):
            for first in range(0, len(rows), size):
                batch, indices = zip(*rows[first : first + size], strict=True)
                yield torch.stack(batch), targets, list(indices)

    def measure(
        self, bench: Bench, model: nn.Module, length: int, size: int, advance: Advance
    ) -> dict[str, Any]:
        """Return the fraction of keys retrieved, overall and by depth, and of key tokens."""
        samples = self._count(bench)
        retrieved: dict[int, bool] = {}
        tokens, correct = 0, 0
        for batch, targets, indices in self.batches(bench, length, size):
            greedy = score_last(model, batch, targets).greedy
            retrieved.update(zip(indices, greedy.all(dim=1).tolist(), strict=True))
            correct += int(greedy.sum())
            tokens += greedy.numel()
            advance(len(batch))
        bands: dict[float, list[bool]] = {}
        for index in range(samples):
            band = int(DEPTH_BANDS * (index + 0.5) / samples)
            bands.setdefault((band + 0.5) / DEPTH_BANDS, []).append(retrieved[index])
        exact = sum(retrieved.values()) / samples
        low, high = wilson(exact, samples)
        parts = [
            {"depth": depth, "score": sum(band) / len(band), "n": len(band)}
            for depth, band in bands.items()
        ]
        return {
            "exact": exact,
            "tokens": correct / tokens,
            "n": samples,
            "low": low,
            "high": high,
            "parts": parts if len(parts) > 1 else [],
        }

    def units(self, bench: Bench, length: int) -> int:
        """Return the number of samples per cell, after checking that one fits."""
        self.sample(bench, length, 0)
        return self._count(bench)

    def _count(self, bench: Bench) -> int:
        return bench.samples if self.samples is None else self.samples


def draw_sentence(tokenizer: Any, draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sentence with a random key, its beginning up to the key, and the key, as tokens."""
    keys = [f"{draw.randrange(100_000):05d}" for _ in range(8)]
    encoded = [tokenize(tokenizer, SENTENCE.format(key=key)).tolist() for key in keys]
    # tokens that are the same for all keys belong to the sentence, the others to the key
    before = _common_prefix(encoded)
    after = _common_prefix([ids[::-1] for ids in encoded])
    sentence = torch.tensor(encoded[0])
    return sentence, sentence[:before], sentence[before : len(sentence) - after]


def _common_prefix(lists: list[list[int]]) -> int:
    """Return the length of the common prefix of all lists."""
    return sum(
        1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    )

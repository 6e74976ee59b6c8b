"""Passkey retrieval: repeat five digits that stood somewhere in the context."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.statistics import wilson
from hf_rope_ext.evals.text import require_answer, require_tokens, tokenize

DEPTH_BANDS = 5
"""Parts of the context by which keys are counted."""

SENTENCE = "\nThe pass key is {key}.\n"


@dataclass(frozen=True)
class PasskeyTask:
    """Plant a key in a text, ask for it at the end, and score it in one forward.

    A sample counts as retrieved if every token of the key is the most likely one given the tokens
    before it, which is what greedy decoding would write. The whole sample, key included, has the
    length asked for; keys and places do not depend on the method, so methods can be compared
    sample by sample.

    Args:
        tokenizer: The model's tokenizer.
        ids: Tokens of the text to hide it in, ``(tokens,)``.
        longest: The longest length that will be asked for, in tokens.
        samples: How many, at depths spread evenly from start to end.
        seed: Of keys and places in the text.
        prefix: Tokens put before each sample, such as the beginning-of-text token.
    """

    tokenizer: Any
    ids: Tensor
    longest: int
    samples: int = 50
    seed: int = 0
    prefix: tuple[int, ...] = ()

    name = "passkey"
    metric = "exact"

    def __post_init__(self) -> None:
        """Check that the text is long enough, and that keys can be written."""
        require_tokens(self.ids, self.longest, f"a length of {self.longest}")
        require_answer(self.tokenizer, "0123456789", self.name)

    def sample(self, length: int, index: int) -> tuple[Tensor, int]:
        """Return one sample, ``(length,)``, and how many tokens at its end are the key.

        Raises:
            RopeError: If the length has no room for the sentence and the question.
        """
        draw = random.Random(f"{self.seed}/{length}/{index}")
        sentence, cue, answer = self._sentence(draw)
        around = length - len(self.prefix) - len(sentence) - len(cue) - len(answer)
        if around < 0:
            raise RopeError(
                f"a length of {length} has no room for the pass key's sentence and its question, "
                f"which take {length - around} tokens."
            )
        first = draw.randrange(len(self.ids) - around + 1)
        text = self.ids[first : first + around]
        depth = round(around * (index + 0.5) / self.samples)
        parts = (torch.tensor(self.prefix), text[:depth], sentence, text[depth:], cue, answer)
        return torch.cat([part.long() for part in parts]), len(answer)

    def batches(self, length: int, size: int) -> Iterator[tuple[Tensor, int, list[int]]]:
        """Yield samples of one length, the length of their keys, and their numbers."""
        alike: dict[int, list[tuple[Tensor, int]]] = {}
        for index in range(self.samples):
            row, targets = self.sample(length, index)
            alike.setdefault(targets, []).append((row, index))
        for targets, rows in sorted(alike.items()):
            for first in range(0, len(rows), size):
                batch, numbers = zip(*rows[first : first + size], strict=True)
                yield torch.stack(batch), targets, list(numbers)

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the share of keys retrieved whole, in all and by depth, and of their tokens."""
        whole: dict[int, bool] = {}
        tokens, right = 0, 0
        for batch, targets, numbers in self.batches(length, size):
            greedy = score_last(model, batch, targets).greedy
            whole.update(zip(numbers, greedy.all(dim=1).tolist(), strict=True))
            right += int(greedy.sum())
            tokens += greedy.numel()
            advance(len(batch))
        bands: dict[float, list[bool]] = {}
        for index in range(self.samples):
            band = int(DEPTH_BANDS * (index + 0.5) / self.samples)
            bands.setdefault((band + 0.5) / DEPTH_BANDS, []).append(whole[index])
        exact = sum(whole.values()) / self.samples
        low, high = wilson(exact, self.samples)
        parts = [
            {"depth": depth, "score": sum(found) / len(found), "n": len(found)}
            for depth, found in bands.items()
        ]
        return {
            "exact": exact,
            "tokens": right / tokens,
            "n": self.samples,
            "low": low,
            "high": high,
            "parts": parts if len(parts) > 1 else [],
        }

    def units(self, length: int) -> int:
        """Return how many samples a length takes, which must have room for them."""
        self.sample(length, 0)
        return self.samples

    def _sentence(self, draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Return a sentence with a key, its beginning up to the key, and the key."""
        keys = [f"{draw.randrange(100_000):05d}" for _ in range(8)]
        encoded = [tokenize(self.tokenizer, SENTENCE.format(key=key)).tolist() for key in keys]
        # the tokens before and after the key are those that do not change with it
        before = _common_prefix(encoded)
        after = _common_prefix([ids[::-1] for ids in encoded])
        sentence = torch.tensor(encoded[0])
        return sentence, sentence[:before], sentence[before : len(sentence) - after]


def _common_prefix(lists: list[list[int]]) -> int:
    """Return how many entries all lists begin with alike."""
    return sum(
        1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    )

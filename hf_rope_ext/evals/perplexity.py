"""Perplexity by context length, over the same target tokens at every length."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.text import require_tokens


@dataclass(frozen=True)
class PerplexityTask:
    """Score the last tokens of windows that end at the same places whatever their length.

    A model that uses the longer context finds the same tokens more likely; one that breaks beyond
    its trained length finds them less likely.

    Args:
        ids: Tokens of a text, ``(tokens,)``.
        longest: The longest length that will be asked for, in tokens.
        windows: How many places, spread evenly over the text.
        targets: Scored tokens at the end of each window.
        prefix: Tokens put before each window, such as the beginning-of-text token.
    """

    ids: Tensor
    longest: int
    windows: int = 32
    targets: int = 64
    prefix: tuple[int, ...] = ()

    name = "perplexity"

    def __post_init__(self) -> None:
        """Check that the text is long enough."""
        require_tokens(self.ids, self.longest, f"a length of {self.longest}")

    def ends(self) -> list[int]:
        """Return where the windows end, the same at every length."""
        spread = torch.linspace(self.longest, len(self.ids), self.windows, dtype=torch.float64)
        return sorted(set(spread.round().long().tolist()))

    def batches(self, length: int, size: int) -> Iterator[Tensor]:
        """Yield windows of ``length`` tokens, ``(batch, length)``, ``size`` at most at a time."""
        start = torch.tensor(self.prefix, dtype=torch.int64)
        body = length - len(start)
        rows = [torch.cat((start, self.ids[end - body : end])) for end in self.ends()]
        for first in range(0, len(rows), size):
            yield torch.stack(rows[first : first + size])

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, float]:
        """Return the perplexity at a length, weighted by tokens.

        Raises:
            RopeError: If the length leaves no room for the targets.
        """
        if length <= self.targets + len(self.prefix):
            raise RopeError(
                f"a length of {length} leaves no context before {self.targets} scored tokens."
            )
        total, count = 0.0, 0
        for batch in self.batches(length, size):
            scores = score_last(model, batch, self.targets)
            total -= float(scores.log_probs.sum())
            count += scores.log_probs.numel()
            advance(len(batch))
        nll = total / count
        return {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "tokens": count}

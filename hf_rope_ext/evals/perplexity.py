"""Perplexity by context length: which windows of a text are run, and which tokens are scored."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.text import require_tokens

Mode = Literal["last_block", "sliding", "disjoint", "truncate"]
MODES: tuple[Mode, ...] = ("last_block", "sliding", "disjoint", "truncate")


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of a text, of which those from ``scored`` on are scored."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True)
class PerplexityTask:
    """Perplexity of a text, each token given what stands before it in its window.

    ``last_block`` scores the same tokens at every length, at the end of windows that end at the
    same places: a model that uses the longer context finds them more likely. ``sliding`` scores
    every token of the text, ``stride`` at a time, with at least ``length - stride`` tokens before
    it (Press et al., 2022, arXiv:2108.12409; PI and YaRN use stride 256). ``disjoint`` cuts the
    text into blocks, the stride being the length. Where there is no prefix, the first token of a
    window is its context. ``truncate`` scores all tokens of windows that begin at the same places
    (YaRN's figure 1).

    Args:
        ids: Tokens of a text, ``(tokens,)``.
        longest: The longest length that will be asked for, in tokens.
        windows: How many places, spread evenly over the text (``last_block`` and ``truncate``).
        targets: Scored tokens at the end of each window (``last_block``).
        prefix: Tokens put before each window, such as the beginning-of-text token.
        mode: Which windows.
        stride: Tokens that each further window scores (``sliding``).
    """

    ids: Tensor
    longest: int
    windows: int = 32
    targets: int = 64
    prefix: tuple[int, ...] = ()
    mode: Mode = "last_block"
    stride: int = 256

    name = "perplexity"
    metric = "perplexity"

    def __post_init__(self) -> None:
        """Check that the text is long enough."""
        if self.mode not in MODES:
            raise RopeError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        for knob in ("windows", "targets", "stride"):
            value = getattr(self, knob)
            if not isinstance(value, int) or value < 1:
                raise RopeError(f"{knob} must be a whole number of at least 1, got {value!r}.")
        require_tokens(self.ids, self.longest, f"a length of {self.longest}")

    def ends(self) -> list[int]:
        """Return where the windows of ``last_block`` end, the same at every length."""
        return _spread(self.longest, len(self.ids), self.windows)

    def cut(self, length: int) -> list[Window]:
        """Return the windows of one length.

        Raises:
            RopeError: If the length leaves no context before the scored tokens.
        """
        body = length - len(self.prefix)
        # without a prefix there is nothing before the first token to predict it from
        blind = 0 if self.prefix else 1
        if self.mode == "last_block":
            if length <= self.targets + len(self.prefix):
                raise RopeError(
                    f"a length of {length} leaves no context before {self.targets} scored tokens."
                )
            return [Window(end - body, end, end - self.targets) for end in self.ends()]
        if body <= blind:
            raise RopeError(f"a length of {length} leaves no token to score.")
        if self.mode == "truncate":
            begins = _spread(0, len(self.ids) - self.longest, self.windows)
            return [Window(begin, begin + body, begin + blind) for begin in begins]
        stride = body - blind if self.mode == "disjoint" else self.stride
        if stride > body - blind:
            raise RopeError(
                f"a stride of {stride} does not fit in windows of {body - blind} tokens after "
                f"the first; give a smaller stride or longer lengths."
            )
        ends = [*range(body, len(self.ids), stride), len(self.ids)]
        later = [Window(end - body, end, before) for before, end in pairwise(ends)]
        return [Window(0, body, blind), *later]

    def units(self, length: int) -> int:
        """Return how many windows a length takes."""
        return len(self.cut(length))

    def batches(self, length: int, size: int) -> Iterator[Tensor]:
        """Yield windows of ``length`` tokens, ``(batch, length)``, ``size`` at most at a time."""
        for rows, _ in self._batches(length, size):
            yield rows

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the perplexity at a length.

        ``perplexity`` weights every token alike; ``yarn_compat`` is the exponential of the mean of
        the windows' means, as YaRN's script computes it. ``buckets`` hold the mean by the number
        of tokens before the scored one, in powers of two.

        Raises:
            RopeError: If the length leaves no room for the targets.
        """
        sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])
        means: list[float] = []
        for rows, targets in self._batches(length, size):
            losses = -score_last(model, rows, targets).log_probs
            means += losses.mean(dim=1).tolist()
            first = rows.shape[1] - targets
            for bucket, start, end in _buckets(first, rows.shape[1]):
                part = losses[:, start - first : end - first]
                sums[bucket][0] += float(part.sum())
                sums[bucket][1] += part.numel()
            advance(len(rows))
        total, count = (sum(one[part] for one in sums.values()) for part in (0, 1))
        nll = total / count
        return {
            "perplexity": _exp(nll),
            "nll": nll,
            "tokens": int(count),
            "yarn_compat": _exp(sum(means) / len(means)),
            "buckets": [
                {"from": start, "nll": loss / number, "tokens": int(number)}
                for start, (loss, number) in sorted(sums.items())
            ],
        }

    def _batches(self, length: int, size: int) -> Iterator[tuple[Tensor, int]]:
        start = torch.tensor(self.prefix, dtype=torch.int64)
        alike: dict[int, list[Tensor]] = {}
        for window in self.cut(length):
            row = torch.cat((start, self.ids[window.begin : window.end]))
            alike.setdefault(window.end - window.scored, []).append(row)
        for targets, rows in alike.items():
            for first in range(0, len(rows), size):
                yield torch.stack(rows[first : first + size]), targets


@dataclass(frozen=True)
class LongPerplexityTask:
    """LongPPL: perplexity of the tokens that need the long context (arXiv:2410.23771).

    A token is one of them if the long context makes it likelier than a short one by more than
    ``alpha``, in nats, and its log-probability is above ``beta``.

    Args:
        ids: Tokens of a text, ``(tokens,)``.
        longest: The longest length that will be asked for, in tokens.
        short: Tokens of the short context.
        windows: How many places, spread evenly over the text.
        prefix: Tokens put before each window.
        alpha: Least gain in log-probability.
        beta: Least log-probability under the long context.
        evaluator: The model that picks the tokens; the measured one picks its own if not given.
    """

    ids: Tensor
    longest: int
    short: int
    windows: int = 8
    prefix: tuple[int, ...] = ()
    alpha: float = 2.0
    beta: float = -2.0
    evaluator: nn.Module | None = None

    name = "longppl"
    metric = "longppl"

    def __post_init__(self) -> None:
        """Check that text and short context are long enough."""
        require_tokens(self.ids, self.longest, f"a length of {self.longest}")
        if not 8 + len(self.prefix) <= self.short < self.longest:
            raise RopeError(
                f"short must be from {8 + len(self.prefix)} to less than the longest length "
                f"{self.longest}, got {self.short!r}."
            )

    def units(self, length: int) -> int:
        """Return how many windows a length takes."""
        return len(_spread(0, len(self.ids) - self.longest, self.windows))

    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return LongPPL at a length, None where no token needs the long context."""
        evaluator = self.evaluator or model
        losses: list[float] = []
        scored = 0
        for begin in _spread(0, len(self.ids) - self.longest, self.windows):
            window = self.ids[begin : begin + length - len(self.prefix)]
            if length > self.short:
                targets = length - self.short
                own = self._long(model, window, targets)
                judged = own if evaluator is model else self._long(evaluator, window, targets)
                batch = max(size * length // self.short, 1)
                gain = judged - self._short(evaluator, window, targets, batch)
                chosen = (gain > self.alpha) & (judged > self.beta)
                losses += (-own[chosen]).tolist()
                scored += targets
            advance(1)
        nll = sum(losses) / len(losses) if losses else None
        found = None if nll is None else _exp(nll)
        return {"longppl": found, "nll": nll, "key_tokens": len(losses), "tokens": scored}

    def _long(self, model: nn.Module, window: Tensor, targets: int) -> Tensor:
        return score_last(model, self._row(window)[None], targets).log_probs[0]

    def _short(self, model: nn.Module, window: Tensor, targets: int, size: int) -> Tensor:
        """Return the log-probabilities of the last tokens given the short context only."""
        body = self.short - len(self.prefix)
        step = max(body // 4, 1)
        ends = [*range(len(window) - targets, len(window), step), len(window)]
        *full, (done, last) = pairwise(ends)
        found = []
        for first in range(0, len(full), size):
            rows = [self._row(window[end - body : end]) for _, end in full[first : first + size]]
            found.append(score_last(model, torch.stack(rows), step).log_probs.flatten())
        row = self._row(window[last - body : last])
        found.append(score_last(model, row[None], last - done).log_probs[0])
        return torch.cat(found)

    def _row(self, body: Tensor) -> Tensor:
        return torch.cat((torch.tensor(self.prefix, dtype=torch.int64), body))


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return up to ``count`` different places, evenly from first to last."""
    places = torch.linspace(first, last, count, dtype=torch.float64)
    return sorted(set(places.round().long().tolist()))


def _buckets(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the powers of two that positions fall under, with the positions of each."""
    start = first
    while start < end:
        bucket = 1 << (start.bit_length() - 1) if start else 0
        stop = min(end, 2 * bucket or 1)
        yield bucket, start, stop
        start = stop


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))

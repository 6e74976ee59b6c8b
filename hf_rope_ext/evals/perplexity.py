"""Perplexity by context length: the windows of text to run, and the tokens scored in each."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_rope_ext.checks import require_choice, require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.bench import Advance, Bench
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.tasks.base import TextTask
from hf_rope_ext.evals.text import require_tokens

Mode = Literal["last_block", "sliding", "disjoint", "truncate"]
MODES: tuple[Mode, ...] = ("last_block", "sliding", "disjoint", "truncate")


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of a text, scored from ``scored`` on."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class Perplexity(TextTask):
    """Perplexity of the same tokens at every length, in the first ``tokens`` tokens of the text.

    ``last_block`` scores the same tokens at every length, at the end of windows that end at the
    same positions: a model that uses the longer context assigns them a higher probability.
    ``sliding`` scores every token of the text, ``stride`` at a time, each with at least ``length -
    stride`` tokens of context (Press et al., 2022, arXiv:2108.12409; PI and YaRN use stride 256).
    ``disjoint`` cuts the text into blocks, so the stride is the length. Without a prefix, the first
    token of a window is context only. ``truncate`` scores all tokens of windows that begin at the
    same positions (YaRN, figure 1).

    Args:
        mode: Which windows to run.
        windows: Number of windows, spread evenly over the text (``last_block`` and ``truncate``).
            None for `Bench.windows`; likewise for ``targets``.
        targets: Tokens scored at the end of each window (``last_block``).
        stride: New tokens scored per window (``sliding``).
        tokens: Use only the first tokens of the text; None for all.
    """

    metric = "perplexity"

    mode: Mode = "last_block"
    windows: int | None = None
    targets: int | None = None
    stride: int = 256
    tokens: int | None = None

    def check(self) -> None:
        """Check the options."""
        require_choice("mode", self.mode, MODES)
        for option in ("windows", "targets", "stride", "tokens"):
            if getattr(self, option) is not None:
                require_integer(option, getattr(self, option), 1)

    def longest(self, bench: Bench) -> int:
        """Return the longest context length of all cells."""
        return bench.longest

    def ids(self, bench: Bench) -> Tensor:
        """Return the tokens of the text, ``(tokens,)``."""
        return bench.ids[: self.tokens]

    def require_text(self, bench: Bench) -> None:
        """Check that the text is long enough."""
        longest = self.longest(bench)
        require_tokens(self.ids(bench), longest, f"a length of {longest}")

    def ends(self, bench: Bench) -> list[int]:
        """Return the ends of the ``last_block`` windows, the same at every length."""
        return _spread(self.longest(bench), len(self.ids(bench)), self.windows or bench.windows)

    def cut(self, bench: Bench, length: int) -> list[Window]:
        """Return the windows for one length.

        Raises:
            RopeError: If the length leaves no context before the scored tokens.
        """
        body = length - len(bench.prefix)
        # without a prefix, nothing precedes the first token, so it cannot be predicted
        unscored = 0 if bench.prefix else 1
        if self.mode == "last_block":
            targets = self.targets or bench.targets
            if length <= targets + len(bench.prefix):
                raise RopeError(
                    f"a length of {length} leaves no context before {targets} scored tokens."
                )
            return [Window(end - body, end, end - targets) for end in self.ends(bench)]
        if body <= unscored:
            raise RopeError(f"a length of {length} leaves no token to score.")
        count = len(self.ids(bench))
        if self.mode == "truncate":
            last = count - self.longest(bench)
            begins = _spread(0, last, self.windows or bench.windows)
            return [Window(begin, begin + body, begin + unscored) for begin in begins]
        stride = body - unscored if self.mode == "disjoint" else self.stride
        if stride > body - unscored:
            raise RopeError(
                f"a stride of {stride} does not fit in windows of {body - unscored} tokens after "
                f"the first; use a smaller stride or longer lengths."
            )
        ends = [*range(body, count, stride), count]
        later = [Window(end - body, end, before) for before, end in pairwise(ends)]
        return [Window(0, body, unscored), *later]

    def units(self, bench: Bench, length: int) -> int:
        """Return the number of windows per cell."""
        return len(self.cut(bench, length))

    def measure(
        self, bench: Bench, model: nn.Module, length: int, size: int, advance: Advance
    ) -> dict[str, Any]:
        """Return the perplexity at a length.

        ``perplexity`` weights all tokens equally; ``yarn_compat`` is the exponential of the mean of
        per-window means, as YaRN's script computes it. ``buckets`` holds mean losses by the number
        of preceding tokens, in powers of two.

        Raises:
            RopeError: If the length leaves no context before the scored tokens.
        """
        sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])
        means: list[float] = []
        for rows, targets in self.batches(bench, length, size):
            losses = -score_last(model, rows, targets).log_probs
            means += losses.mean(dim=1).tolist()
            first = rows.shape[1] - targets
            for bucket, start, end in _buckets(first, rows.shape[1]):
                part = losses[:, start - first : end - first]
                sums[bucket][0] += float(part.sum())
                sums[bucket][1] += part.numel()
            advance(len(rows))
        total, count = (sum(bucket[part] for bucket in sums.values()) for part in (0, 1))
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

    def batches(self, bench: Bench, length: int, size: int) -> Iterator[tuple[Tensor, int]]:
        """Yield windows of one length, ``(batch, seq)``, and how many tokens to score in each."""
        ids = self.ids(bench)
        start = torch.tensor(bench.prefix, dtype=torch.int64)
        groups: dict[int, list[Tensor]] = {}
        for window in self.cut(bench, length):
            row = torch.cat((start, ids[window.begin : window.end]))
            groups.setdefault(window.end - window.scored, []).append(row)
        for targets, rows in groups.items():
            for first in range(0, len(rows), size):
                yield torch.stack(rows[first : first + size]), targets


@dataclass(frozen=True, kw_only=True)
class SlidingPerplexity(Perplexity):
    """Perplexity over sliding windows of the text, by default of four times the longest length."""

    mode: Mode = "sliding"

    def ids(self, bench: Bench) -> Tensor:
        """Return the tokens of the text, ``(tokens,)``."""
        return bench.ids[: self.tokens or 4 * bench.longest]


@dataclass(frozen=True, kw_only=True)
class ShortPerplexity(Perplexity):
    """Perplexity of ordinary text at the trained length: the cost where no extension is needed."""

    mode: Mode = field(default="truncate", init=False)
    targets: int | None = field(default=None, init=False)
    stride: int = field(default=256, init=False)
    tokens: int | None = field(default=None, init=False)

    def longest(self, bench: Bench) -> int:
        """Return the trained length."""
        return _trained(bench, "rope_short measures")

    def lengths(self, bench: Bench, requested: tuple[int, ...]) -> tuple[int, ...]:
        """Return the trained length."""
        return (self.longest(bench),)


@dataclass(frozen=True, kw_only=True)
class LongPerplexity(TextTask):
    """LongPPL: perplexity of the tokens that need the long context (arXiv:2410.23771).

    These key tokens gain more than ``alpha`` nats in log-probability from the long context over a
    short one, and have a log-probability above ``beta``.

    Args:
        short: Length of the short context; None for half the trained length.
        windows: Number of windows, spread evenly over the text.
        alpha: Minimum gain in log-probability.
        beta: Minimum log-probability under the long context.
        evaluator: Model that selects the key tokens; None for the measured model itself.
    """

    metric = "longppl"

    short: int | None = None
    windows: int = 8
    alpha: float = 2.0
    beta: float = -2.0
    evaluator: nn.Module | None = None

    def check(self) -> None:
        """Check the options."""
        require_integer("windows", self.windows, 1)
        require_number("alpha", self.alpha)
        require_number("beta", self.beta)
        if self.evaluator is not None and not isinstance(self.evaluator, nn.Module):
            raise RopeError(f"evaluator must be a model in memory, got {self.evaluator!r}.")

    def require_text(self, bench: Bench) -> None:
        """Check that text and short context are long enough."""
        require_tokens(bench.ids, bench.longest, f"a length of {bench.longest}")
        least = 8 + len(bench.prefix)
        short = self._short_length(bench)
        if not isinstance(short, int) or not least <= short < bench.longest:
            raise RopeError(
                f"short must be from {least} to less than the longest length "
                f"{bench.longest}, got {short!r}."
            )

    def units(self, bench: Bench, length: int) -> int:
        """Return the number of windows per cell."""
        return len(self._begins(bench))

    def measure(
        self, bench: Bench, model: nn.Module, length: int, size: int, advance: Advance
    ) -> dict[str, Any]:
        """Return LongPPL at a length; None if there are no key tokens."""
        evaluator = self.evaluator or model
        short = self._short_length(bench)
        losses: list[float] = []
        scored = 0
        for begin in self._begins(bench):
            window = bench.ids[begin : begin + length - len(bench.prefix)]
            if length > short:
                targets = length - short
                measured = _long(bench, model, window, targets)
                judged = (
                    measured if evaluator is model else _long(bench, evaluator, window, targets)
                )
                batch = max(size * length // short, 1)
                gain = judged - _short(bench, evaluator, window, targets, short, batch)
                chosen = (gain > self.alpha) & (judged > self.beta)
                losses += (-measured[chosen]).tolist()
                scored += targets
            advance(1)
        nll = sum(losses) / len(losses) if losses else None
        longppl = None if nll is None else _exp(nll)
        return {"longppl": longppl, "nll": nll, "key_tokens": len(losses), "tokens": scored}

    def _begins(self, bench: Bench) -> list[int]:
        return _spread(0, len(bench.ids) - bench.longest, self.windows)

    def _short_length(self, bench: Bench) -> int:
        if self.short is not None:
            return self.short
        return max(_trained(bench, "the short context of rope_longppl is half of") // 2, 8)


def _trained(bench: Bench, use: str) -> int:
    if not bench.trained:
        raise RopeError(
            f"{use} the trained length, which is not in the config; give "
            f"original_max_position_embeddings, or short=TOKENS to rope_longppl."
        )
    return bench.trained


def _long(bench: Bench, model: nn.Module, window: Tensor, targets: int) -> Tensor:
    """Return the log-probabilities of the last tokens given the whole window."""
    return score_last(model, _row(bench, window)[None], targets).log_probs[0]


def _short(
    bench: Bench, model: nn.Module, window: Tensor, targets: int, short: int, size: int
) -> Tensor:
    """Return the log-probabilities of the last tokens given the short context only."""
    body = short - len(bench.prefix)
    # one forward scores a quarter of the short context, so contexts vary by that much
    step = max(body // 4, 1)
    ends = [*range(len(window) - targets, len(window), step), len(window)]
    *full, (done, last) = pairwise(ends)
    parts = []
    for first in range(0, len(full), size):
        rows = [_row(bench, window[end - body : end]) for _, end in full[first : first + size]]
        parts.append(score_last(model, torch.stack(rows), step).log_probs.flatten())
    row = _row(bench, window[last - body : last])
    parts.append(score_last(model, row[None], last - done).log_probs[0])
    return torch.cat(parts)


def _row(bench: Bench, body: Tensor) -> Tensor:
    return torch.cat((torch.tensor(bench.prefix, dtype=torch.int64), body))


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return up to ``count`` distinct positions, evenly spaced from first to last."""
    positions = torch.linspace(first, last, count, dtype=torch.float64)
    return sorted(set(positions.round().long().tolist()))


def _buckets(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield each power of two among the positions, with the range of positions it covers."""
    start = first
    while start < end:
        bucket = 1 << (start.bit_length() - 1) if start else 0
        stop = min(end, 2 * bucket or 1)
        yield bucket, start, stop
        start = stop


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))

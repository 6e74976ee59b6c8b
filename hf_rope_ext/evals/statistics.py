"""Statistics of scores by length: confidence intervals, effective lengths, averages."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

RULER_THRESHOLD = 0.856
"""RULER's threshold: the score of Llama-2-7B-chat at 4096 tokens (arXiv:2404.06654, sec. 4)."""

RELATIVE_THRESHOLD = 0.85
"""NoLiMa's threshold, relative to the model's base score (arXiv:2502.05167, sec. 4)."""

PASSKEY_THRESHOLD = 0.2
"""Position Interpolation's threshold for pass keys (arXiv:2306.15595, sec. 3.3)."""


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson, 1927).

    For scores with values strictly between 0 and 1, the interval is conservative.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # rounding must not exclude a share of 0 or 1 from its own interval, nor leave 0 to 1
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(min(low, share), 0.0), min(max(high, share), 1.0)


def effective_length(scores: Mapping[int, float], threshold: float = RULER_THRESHOLD) -> int | None:
    """Return the longest length whose score exceeds the threshold, or None."""
    return max((length for length, score in scores.items() if score > threshold), default=None)


def base_score(scores: Mapping[int, float], trained: int) -> float:
    """Return the best score within the trained length, or else that of the shortest length."""
    trained_scores = [score for length, score in scores.items() if length <= trained]
    return max(trained_scores) if trained_scores else scores[min(scores)]


def own_effective_length(scores: Mapping[int, float], base: float) -> int | None:
    """Return the longest length up to which all scores reach 85 % of the base score."""
    return longest_run(scores, RELATIVE_THRESHOLD * base) if base > 0 else None


def k_max(scores: Mapping[int, float]) -> int | None:
    """Return the longest length up to which all scores are at least 20 %."""
    return longest_run(scores, PASSKEY_THRESHOLD)


def longest_run(scores: Mapping[int, float], threshold: float) -> int | None:
    """Return the longest length up to which all scores are at least ``threshold``."""
    reached = None
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        reached = length
    return reached


def weighted_averages(scores: Mapping[int, float]) -> tuple[float, float]:
    """Return averages with weights that increase and decrease linearly with length (RULER)."""
    ordered = [scores[length] for length in sorted(scores)]
    weights = range(1, len(ordered) + 1)
    total = sum(weights)
    rising = sum(w * score for w, score in zip(weights, ordered, strict=True)) / total
    falling = sum(w * score for w, score in zip(reversed(weights), ordered, strict=True)) / total
    return rising, falling


def summary(results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the mean of each score, the number of results and Wilson's interval."""
    means = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
    low, high = wilson(means["score"], len(results))
    return {**means, "n": len(results), "low": low, "high": high}


def by_place(
    places: Sequence[tuple[float | None, str | None]], results: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Return the summary of all results, and under ``parts`` that of each depth and group."""
    parts: dict[tuple[float | None, str | None], list[Mapping[str, float]]] = {}
    for place, result in zip(places, results, strict=True):
        parts.setdefault(place, []).append(result)
    table = [
        {"depth": depth, "group": group, **summary(part)} for (depth, group), part in parts.items()
    ]
    return {**summary(results), "parts": table if len(table) > 1 else []}

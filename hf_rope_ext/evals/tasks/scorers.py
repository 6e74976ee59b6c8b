"""Scorers: pure functions of a prediction and the reference answers, with values from 0 to 1."""

import re
from collections import Counter
from collections.abc import Sequence


def printable(prediction: str) -> str:
    """Return a prediction with control characters as newlines, stripped, as RULER does."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction: str, gold: Sequence[str]) -> float:
    """Return the fraction of answers that occur in a prediction, ignoring case.

    RULER's score for all tasks except question answering (Hsieh et al., 2024, arXiv:2404.06654).
    """
    text = printable(prediction).lower()
    return sum(answer.lower() in text for answer in gold) / len(gold)


def string_match_part(prediction: str, gold: Sequence[str]) -> float:
    """Return 1 if any of the answers occurs in a prediction (RULER's question answering)."""
    text = printable(prediction).lower()
    return float(any(answer.lower() in text for answer in gold))


def first_number(prediction: str) -> str | None:
    """Return the first run of digits."""
    match = re.search(r"\d+", prediction)
    return match[0] if match else None


def final_answer(prediction: str) -> str | None:
    """Return the number after the last ``Answer:``, or else the last number."""
    marked = re.findall(r"answer\s*(?:is)?\s*:?\s*(-?\d+)", prediction, re.IGNORECASE)
    numbers = marked or re.findall(r"-?\d+", prediction)
    return numbers[-1] if numbers else None


def label_match(prediction: str, gold: str, labels: Sequence[str], ignored: Sequence[str]) -> float:
    """Return 1 if the first sentence names the correct label and no other.

    Labels that the question names are ignored (BABILong, Kuratov et al., 2024, arXiv:2406.10149).
    """
    sentence = re.split(r"[.\n]", prediction.strip().lower())[0]
    named = {label for label in labels if label in sentence and label not in ignored}
    return float(named == {gold})


def majority(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """Return the most common answer, the first in a tie, and its fraction of all samples.

    Samples without an answer cannot win, but count in the total (self-consistency, Wang et al.,
    2022, arXiv:2203.11171).
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None, 0.0
    answer, count = counts.most_common(1)[0]
    return answer, count / len(answers)

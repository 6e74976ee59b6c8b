"""RULER's tracing and aggregation tasks: vt, cwe, fwe (arXiv:2404.06654, app. B; NVIDIA/RULER)."""

import math
import random
import string
from dataclasses import dataclass
from itertools import chain, pairwise

from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Place
from hf_rope_ext.evals.tasks.lexicon import common_words
from hf_rope_ext.evals.tasks.prose import NOISE

SHUFFLE_SEED = 42


TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
TRACKING_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {query}, they are: "
)


@dataclass(frozen=True, kw_only=True)
class VariableTracking(DocumentTask):
    """RULER: all variables of a chain of assignments, after a worked example (unit: a line).

    Args:
        chains: Number of chains hidden; the question is about the first.
        hops: Number of assignments per chain after the first.
        example_noise: Number of lines of noise in the worked example.
    """

    max_new_tokens: int = 30
    chains: int = 1
    hops: int = 4
    example_noise: int = 5

    smallest = 5

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a prompt with ``size`` lines of noise."""
        prompt, answer, gold = self.question(draw, size, letters=5)
        shown, shown_answer, shown_gold = self.question(draw, self.example_noise, letters=3)
        example = f"{shown}{shown_answer} {' '.join(shown_gold)}\n\n\n\n"
        return Draft(
            prompt=example + prompt,
            # a trailing space would be a token of its own, unlike in ordinary text
            answer=answer.rstrip(" "),
            target=" " + " ".join(gold),
            gold=tuple(gold),
        )

    def question(
        self, draw: random.Random, size: int, letters: int
    ) -> tuple[str, str, tuple[str, ...]]:
        """Return prompt, opening of the answer, and the variables of the first chain."""
        names, chains = draw_chains(draw, self.chains, self.hops, letters)
        lines = [" ".join(NOISE)] * size
        for assignments in chains:
            places = sorted(draw.sample(range(len(lines)), len(assignments)))
            for shift, (at, line) in enumerate(zip(places, assignments, strict=True)):
                lines.insert(at + shift, line)
        value = chains[0][0].split("=")[-1].strip()
        prompt = TRACKING.format(context="\n".join(lines), query=value)
        return prompt, TRACKING_ANSWER.format(count=self.hops + 1, query=value), tuple(names[0])


def draw_chains(
    draw: random.Random, chains: int, hops: int, letters: int
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the variables and the assignments of each chain, drawn in RULER's order."""
    count = chains * (hops + 1)
    names = [_word(draw, string.ascii_uppercase, letters) for _ in range(count)]
    while len(set(names)) < count:
        names = list(dict.fromkeys(names))
        names.append(_word(draw, string.ascii_uppercase, letters))
    split = [names[first : first + hops + 1] for first in range(0, count, hops + 1)]
    lines = []
    for variables in split:
        start = f"VAR {variables[0]} = {draw.randrange(10000, 99999)}"
        steps = [f"VAR {b} = VAR {a} " for a, b in pairwise(variables)]
        lines.append([start, *steps])
    return split, lines


COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
COMMON_ANSWER = " Answer: The top 10 words that appear most often in the list are:"


@dataclass(frozen=True, kw_only=True)
class CommonWords(DocumentTask):
    """RULER: the ten most common words of a list, after a worked example (unit: a word)."""

    max_new_tokens: int = 120

    smallest = 11

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a list of ``size`` distinct words; with lower frequencies below 4096 tokens."""
        short = place.length < 4096
        shown, shown_words = word_list(draw, *((20, 3, 1) if short else (40, 10, 3)))
        listed, gold = word_list(draw, size, *((6, 1) if short else (30, 3)))
        example = COMMON.format(context=shown) + COMMON_ANSWER + " " + numbered(shown_words)
        return Draft(
            prompt=f"{example}\n{COMMON.format(context=listed)}",
            answer=COMMON_ANSWER,
            target=" " + numbered(gold),
            gold=tuple(gold),
        )

    def largest(self, place: Place) -> int:
        """Return the number of available words."""
        return len(common_words())


def word_list(
    draw: random.Random, count: int, repeats: int, rare_repeats: int, common: int = 10
) -> tuple[str, list[str]]:
    """Return a numbered list of ``count`` distinct words, and the common ones among them."""
    drawn = draw.sample(common_words(), count)
    listed = drawn[:common] * repeats + drawn[common:] * rare_repeats
    random.Random(SHUFFLE_SEED).shuffle(listed)
    return numbered(listed), drawn[:common]


def numbered(words: list[str]) -> str:
    """Return words as ``1. one 2. two``."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the above "
    "coded text?"
)
FREQUENT_ANSWER = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)


@dataclass(frozen=True, kw_only=True)
class FrequentWords(DocumentTask):
    """RULER: the three most frequent of made-up words, with frequencies 1 / rank ** 2."""

    max_new_tokens: int = 50

    # below this, the third and fourth word can be equally frequent
    smallest = 60

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a text of about ``size`` words."""
        text, gold = coded_text(draw, size, max(place.length // 50, 5))
        return Draft(
            prompt=FREQUENT.format(context=text),
            answer=FREQUENT_ANSWER,
            target=" " + " ".join(gold),
            gold=tuple(gold),
        )


def coded_text(draw: random.Random, count: int, vocabulary: int) -> tuple[str, list[str]]:
    """Return a text of made-up words, and the three most frequent ones except the dots."""
    words = [_word(draw, string.ascii_lowercase, 6) for _ in range(vocabulary)]
    while len(set(words)) < vocabulary:
        words.append(_word(draw, string.ascii_lowercase, 6))
    words = sorted(set(words))
    random.Random(SHUFFLE_SEED).shuffle(words)
    words[0] = "..."
    zeta = math.pi**2 / 6
    repeated = ([word] * int(count * rank**-2.0 / zeta) for rank, word in enumerate(words, start=1))
    text = list(chain.from_iterable(repeated))
    random.Random(SHUFFLE_SEED).shuffle(text)
    return " ".join(text), words[1:4]


def _word(draw: random.Random, alphabet: str, letters: int) -> str:
    return "".join(draw.choices(alphabet, k=letters))

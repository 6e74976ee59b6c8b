"""The English words that RULER samples from: those of the package wonderwords."""

import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import overload

from hf_rope_ext.errors import RopeError

SHUFFLE_SEED = 42


class AdjectiveNouns(Sequence[str]):
    """All adjective-noun pairs in alphabetical order, without duplicates: RULER's keys.

    The six million pairs are computed on access. Pairs of one adjective are contiguous unless it is
    a prefix of another (``far-`` and ``far-off-``); such adjectives share a block.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self.nouns = sorted(set(nouns))
        self.blocks: list[list[str]] = []
        for prefix in sorted({f"{adjective}-" for adjective in adjectives}):
            if self.blocks and prefix.startswith(self.blocks[-1][0]):
                self.blocks[-1].append(prefix)
            else:
                self.blocks.append([prefix])
        self.ends = list(accumulate(len(self._block(number)) for number in range(len(self.blocks))))

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[entry] for entry in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = bisect_right(self.ends, index)
        first = self.ends[number - 1] if number else 0
        prefixes = self.blocks[number]
        if len(prefixes) == 1:
            return prefixes[0] + self.nouns[index - first]
        return self._block(number)[index - first]

    def _block(self, number: int) -> list[str]:
        prefixes = self.blocks[number]
        if len(prefixes) == 1:
            return self.nouns
        return sorted({prefix + noun for prefix in prefixes for noun in self.nouns})


@cache
def adjective_nouns() -> AdjectiveNouns:
    """Return the keys of RULER."""
    lists = _categories()
    return AdjectiveNouns(lists["adjective"], lists["noun"])


@cache
def common_words() -> list[str]:
    """Return all words in RULER's fixed shuffled order."""
    words = sorted({word for words in _categories().values() for word in words})
    random.Random(SHUFFLE_SEED).shuffle(words)
    return words


@cache
def _categories() -> dict[str, list[str]]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise RopeError(
            "the RULER tasks sample words from wonderwords: pip install 'hf-rope-ext[eval]'"
        ) from error
    categories = RandomWord()._categories
    return {name: list(categories[name]) for name in ("noun", "adjective", "verb")}

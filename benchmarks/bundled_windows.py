"""Text from Python's standard library, and the bundled model's training windows."""

import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
CUE = "\nThe pass key is "
CLOSE = ".\n"
KEY_DIGITS = 5

# tests, generated files, byte tables, modules that later versions removed, and packages that are
# not part of the standard library
SKIPPED_PARTS = {
    "__pycache__", "encodings", "ensurepip", "idlelib", "lib2to3", "lib-dynload", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
SHORTEST_FILE = 500
HELD_OUT_RULE = "crc32 of the path relative to the standard library, modulo 10, is 0"
LONGEST_SAMPLE_FILE = 16_384
SAMPLE_CHARACTERS = 100_000


class Source(NamedTuple):
    """A source file: its path relative to the standard library, and its text."""

    path: str
    text: str


class Batch(NamedTuple):
    """Windows of tokens and the loss weight of each token, both ``(windows, length)``."""

    tokens: Tensor
    weights: Tensor


def read_sources() -> tuple[list[Source], list[Source]]:
    """Return the standard library's sources, split into training and held-out files."""
    root = Path(sysconfig.get_path("stdlib"))
    kept: dict[bool, list[Source]] = {True: [], False: []}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIPPED_PARTS & set(path.parts) or path.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if len(text) > SHORTEST_FILE:
            held_out = zlib.crc32(path.as_posix().encode()) % 10 == 0
            kept[held_out].append(Source(path.as_posix(), text))
    return kept[False], kept[True]


def sample_text(sources: Iterable[Source]) -> str:
    """Return small whole files, up to 100,000 characters, ordered by the checksum of their path.

    Files that mention a copyright or licence of their own are skipped, so that the whole sample is
    under Python's licence.
    """
    sample = ""
    for source in sorted(sources, key=lambda source: zlib.crc32(source.path.encode())):
        plain = not any(word in source.text.lower() for word in ("copyright", "licen"))
        fits = len(sample) + len(source.text) <= SAMPLE_CHARACTERS
        if plain and fits and len(source.text) <= LONGEST_SAMPLE_FILE:
            sample += source.text
    return sample


def train_tokenizer(sources: Iterable[Source], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that splits numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source.text for source in sources), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, sources: Iterable[Source]) -> Tensor:
    """Return the tokens of all files, each preceded by the end-of-text token."""
    ids: list[int] = []
    for source in sources:
        ids += tokenizer.encode(END_OF_TEXT + source.text).ids
    return torch.tensor(ids)


class Windows:
    """Draws training windows.

    Args:
        tokenizer: The tokenizer of the text.
        text: Tokens to cut windows from, ``(tokens,)``.
        seed: Seed for all sampling.
        digit_weight: Loss weight of a pass key's digits.
    """

    def __init__(
        self, tokenizer: Tokenizer, text: Tensor, seed: int, digit_weight: float = 1.0
    ) -> None:
        self.text = text
        self.digit_weight = digit_weight
        self.generator = torch.Generator().manual_seed(seed)
        self.cue = torch.tensor(tokenizer.encode(CUE).ids)
        self.close = torch.tensor(tokenizer.encode(CLOSE).ids)
        self.digits = torch.tensor([tokenizer.token_to_id(str(digit)) for digit in range(10)])
        single_bytes = len(pre_tokenizers.ByteLevel.alphabet())
        merges = torch.arange(1 + single_bytes, tokenizer.get_vocab_size())
        self.copied = torch.cat([self.digits, merges])

    def plain(self, count: int, length: int) -> Batch:
        """Return windows of text."""
        starts = self._integers(len(self.text) - length, (count, 1))
        tokens = self.text[starts + torch.arange(length)]
        return Batch(tokens, torch.ones(tokens.shape))

    def passkey(self, count: int, length: int) -> Batch:
        """Return windows of text with a pass key at a random depth, repeated at the end."""
        key = self.digits[self._integers(len(self.digits), (count, KEY_DIGITS))]
        sentence = torch.cat([self.cue.expand(count, -1), key, self.close.expand(count, -1)], dim=1)
        size = sentence.shape[1]
        around = length - 2 * size
        parts = torch.cat([self.plain(count, around).tokens, sentence], dim=1)
        depths = self._integers(around + 1, (count, 1))
        positions = torch.arange(length)
        planted = (positions >= depths) & (positions < depths + size)
        # the text resumes after the planted sentence; `parts` itself ends with the sentence
        resumed = positions - size * (positions >= depths)
        tokens = parts.gather(1, torch.where(planted, around + positions - depths, resumed))
        weights = torch.ones(tokens.shape)
        weights[:, self.asked(length)] = self.digit_weight
        return Batch(tokens, weights)

    def asked(self, length: int) -> slice:
        """Return where a pass key window repeats the digits."""
        end = length - len(self.close)
        return slice(end - KEY_DIGITS, end)

    def uniform_copies(self, count: int, length: int) -> Batch:
        """Return random tokens with a random period, scored from the second period on."""
        longest = length // 3
        period = self.copied[self._integers(len(self.copied), (count, longest))]
        return self._repeat(period, length)

    def ambiguous_copies(self, count: int, length: int) -> Batch:
        """Return periodic tokens with long periods over small alphabets, some of digits only.

        A token then occurs several times within a period, and only the tokens before it tell which
        occurrence to continue from.
        """
        longest = length // 2 - 1
        size = len(self.copied)
        alphabet_size = (10 * (size / 10) ** self._uniform((count, 1))).long()
        choices = (self._uniform((count, longest)) * alphabet_size).long()
        alphabets = self.copied[self._uniform((count, size)).argsort(dim=1)]
        only_digits = (self._uniform((count, 1)) < 0.3) & (alphabet_size < 40)
        period = torch.where(only_digits, self.digits[choices % 10], alphabets.gather(1, choices))
        return self._repeat(period, length)

    def _repeat(self, tokens: Tensor, length: int) -> Batch:
        """Repeat a prefix of each row, of 4 tokens up to the whole row, up to a length."""
        periods = 4 + self._integers(tokens.shape[1] - 3, (len(tokens), 1))
        positions = torch.arange(length)
        repeated = tokens.gather(1, positions % periods)
        return Batch(repeated, (positions >= periods).float())

    def _integers(self, below: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator)

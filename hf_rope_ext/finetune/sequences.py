"""From a stream of tokens to training sequences of one length.

Documents are joined or cut, and positions run through: a position that restarts at each document
would show the model no distance longer than the document, whatever the sequence length.
"""

import random
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.documents import Stream
from hf_rope_ext.finetune.loss import IGNORED

PACKINGS = ("join", "cut", "restart")
"""How documents become sequences; ``restart`` is known and refused."""

Example = dict[str, Tensor]


class Sequences(Dataset[Example]):
    """Sequences of one length, read from the stream when asked for.

    Args:
        stream: Tokens.
        length: Of a sequence.
        packing: ``"join"``, documents follow one another across sequences; ``"cut"``, every
            document is cut on its own, and what is shorter than a sequence is left out.

    Raises:
        RopeError: If there is not a single sequence.
    """

    def __init__(self, stream: Stream, length: int, packing: str = "join") -> None:
        if packing == "restart":
            raise RopeError(
                "packing='restart' gives every document positions from 0, so the model sees no "
                "distance longer than a document and learns nothing about a longer context; use "
                "'join' or 'cut'."
            )
        if packing not in PACKINGS:
            raise RopeError(f"packing must be join or cut, got {packing!r}.")
        self.stream, self.length = stream, length
        borders = [0, len(stream)] if packing == "join" else stream.documents.tolist()
        self.starts = [
            start
            for first, last in pairwise(borders)
            for start in range(first, last - length + 1, length)
        ]
        if not self.starts:
            longest = max(last - first for first, last in pairwise(borders))
            raise RopeError(
                f"the text to train on gives no sequence of {length} tokens: "
                + (
                    f"its longest document has {longest}; use packing='join' or longer documents."
                    if packing == "cut"
                    else f"it has {len(stream)} in all; give more text or a shorter sequence."
                )
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        """Return ``input_ids`` and ``labels``, ``(1, length)``."""
        ids, predicted = self.window(index)
        return {"input_ids": ids[None], "labels": ids.where(predicted, IGNORED)[None]}

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of a sequence and whether each is predicted."""
        start = self.starts[index]
        return self.stream.read(start, start + self.length)


class SkipWise(Dataset[Example]):
    """PoSE (Zhu et al., 2023, arXiv:2309.10400): two chunks of a long sequence, positions kept.

    The first chunk, up to half of the training length, starts at 0; the second skips a random
    distance, in the text and in the positions alike, so that over many samples every distance up
    to the target length is seen.

    Args:
        sequences: Sequences of the target length.
        length: Tokens to train on.
        seed: Of the lengths of chunks and skips, which depend on it and the index alone.
    """

    def __init__(self, sequences: Sequences, length: int, seed: int) -> None:
        if not 2 <= length <= sequences.length:
            raise RopeError(
                f"pose_length must lie between 2 and the sequence length {sequences.length}, got "
                f"{length!r}."
            )
        self.sequences, self.length, self.seed = sequences, length, seed
        # as many samples of each sequence as it takes to train on each token once on average
        self.each = max(sequences.length // length, 1)

    def __len__(self) -> int:
        return len(self.sequences) * self.each

    def __getitem__(self, index: int) -> Example:
        """Return ``input_ids``, ``labels`` and ``position_offsets``, ``(1, length)``."""
        draw = random.Random(f"{self.seed}/{index}")
        first = draw.randint(1, (self.length + 1) // 2)
        skip = draw.randint(0, self.sequences.length - self.length)
        ids, predicted = self.sequences.window(index // self.each)
        taken = torch.arange(self.length)
        offsets = torch.where(taken < first, 0, skip)
        ids, predicted = ids[taken + offsets], predicted[taken + offsets]
        if skip:
            predicted[first] = False  # what comes after the skip does not follow from before it
        return {
            "input_ids": ids[None],
            "labels": ids.where(predicted, IGNORED)[None],
            "position_offsets": offsets[None],
        }


class MixedWindows(Dataset[Example]):
    """Some sequences whole, the others as a batch of short ones (LongRoPE2, arXiv:2502.20082).

    Args:
        sequences: Sequences of the target length.
        short: Length of a short one, the trained length.
        share: Share of the sequences that are cut short.
        seed: Of which.
    """

    def __init__(self, sequences: Sequences, short: int, share: float, seed: int) -> None:
        if not 0 < share < 1:
            raise RopeError(f"mixed_windows must be a share between 0 and 1, got {share!r}.")
        if sequences.length % short:
            raise RopeError(
                f"mixed windows cut {sequences.length} tokens into rows of the trained length "
                f"{short}, which does not divide it."
            )
        self.sequences, self.short, self.share, self.seed = sequences, short, share, seed

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Example:
        """Return ``input_ids`` and ``labels``, ``(1, length)`` or ``(length / short, short)``."""
        example = self.sequences[index]
        if random.Random(f"{self.seed}/{index}").random() >= self.share:
            return example
        return {name: tensor.reshape(-1, self.short) for name, tensor in example.items()}


def collate(examples: list[Example]) -> dict[str, Any]:
    """Return one batch.

    Raises:
        RopeError: If a batch would hold sequences of several lengths.
    """
    if len({example["input_ids"].shape[-1] for example in examples}) > 1:
        raise RopeError(
            "mixed windows need per_device_train_batch_size=1, because a batch has rows of one "
            "length; use gradient_accumulation_steps instead."
        )
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}

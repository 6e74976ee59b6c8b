"""Cut a stream of tokens into training sequences of one length.

Positions never restart within a sequence: if they did at each document, the model would see no
distance longer than a document, whatever the sequence length.
"""

import random
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_rope_ext.checks import require_choice, require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.documents import Stream
from hf_rope_ext.finetune.loss import IGNORED

PACKINGS = ("join", "cut", "restart")
"""How documents become sequences; ``restart`` is recognized and refused."""

Example = dict[str, Tensor]


class Sequences(Dataset[Example]):
    """Sequences of one length, read from the stream on demand.

    Args:
        stream: The tokens.
        length: Tokens per sequence.
        packing: ``"join"`` to let documents continue across sequences; ``"cut"`` to cut each
            document separately and drop what is shorter than a sequence.

    Raises:
        RopeError: If there is no sequence at all.
    """

    def __init__(self, stream: Stream, length: int, packing: str = "join") -> None:
        if packing == "restart":
            raise RopeError(
                "packing='restart' would restart positions at every document, so that the model "
                "sees no distance longer than a document; use 'join' or 'cut'."
            )
        require_choice("packing", packing, PACKINGS[:2])
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
                f"the training text has no sequence of {length} tokens: "
                + (
                    f"its longest document has {longest}; use packing='join' or longer documents."
                    if packing == "cut"
                    else f"it has {len(stream)} in all; use more text or a shorter sequence_length."
                )
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        """Return ``input_ids`` and ``labels``, ``(1, length)``."""
        ids, predicted = self.window(index)
        return {"input_ids": ids[None], "labels": ids.where(predicted, IGNORED)[None]}

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of a sequence and which of them are predicted."""
        start = self.starts[index]
        return self.stream.read(start, start + self.length)


class SkipWise(Dataset[Example]):
    """Two chunks of each long sequence, at their own positions.

    PoSE (Zhu et al., 2023, arXiv:2309.10400): the first chunk, up to half of the training length,
    starts at 0. The second skips a random distance in both text and positions, so that over many
    samples the model sees every distance up to the target length.

    Args:
        sequences: Sequences of the target length.
        length: Tokens per training sample.
        seed: Seed for the chunks; they depend only on it and the index.
    """

    def __init__(self, sequences: Sequences, length: int, seed: int) -> None:
        require_integer("pose_length", length, 2, sequences.length, unit="tokens")
        self.sequences, self.length, self.seed = sequences, length, seed
        # samples per sequence, so that on average every token is trained on once
        self.samples = max(sequences.length // length, 1)

    def __len__(self) -> int:
        return len(self.sequences) * self.samples

    def __getitem__(self, index: int) -> Example:
        """Return ``input_ids``, ``labels`` and ``position_offsets``, ``(1, length)``."""
        generator = random.Random(f"{self.seed}/{index}")
        first = generator.randint(1, (self.length + 1) // 2)
        skip = generator.randint(0, self.sequences.length - self.length)
        ids, predicted = self.sequences.window(index // self.samples)
        steps = torch.arange(self.length)
        offsets = torch.where(steps < first, 0, skip)
        ids, predicted = ids[steps + offsets], predicted[steps + offsets]
        if skip:
            predicted[first] = False  # this token does not follow from those before the skip
        return {
            "input_ids": ids[None],
            "labels": ids.where(predicted, IGNORED)[None],
            "position_offsets": offsets[None],
        }


class MixedWindows(Dataset[Example]):
    """Whole sequences mixed with batches of short ones (LongRoPE2, arXiv:2502.20082).

    Args:
        sequences: Sequences of the target length.
        short: Length of the short ones: the trained length.
        share: Share of the sequences that are cut into short ones.
        seed: Seed for the choice.
    """

    def __init__(self, sequences: Sequences, short: int, share: float, seed: int) -> None:
        require_number("mixed_windows", share, above=0, below=1)
        if sequences.length % short:
            raise RopeError(
                f"mixed_windows needs a sequence length that is a multiple of the trained length "
                f"{short}, got {sequences.length}."
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
        RopeError: If the sequences differ in length.
    """
    if len({example["input_ids"].shape[-1] for example in examples}) > 1:
        raise RopeError(
            "mixed_windows needs per_device_train_batch_size=1, because rows of a batch have one "
            "length; use gradient_accumulation_steps instead."
        )
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}

"""What a call of a text model asks for, of which its plan is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_rope_ext.rotary.running import Generation


@dataclass(frozen=True, eq=False)
class Asked:
    """What a call asks for.

    Args:
        rows: Number of its rows.
        tokens: Number of tokens in each.
        positions: Its positions, with the family's extra text axis in front, if any; None where
            the model computes them.
        mask: Its padding mask, ``(batch, seq)`` or longer by the tokens in the cache, if any.
        generation: What is running.
    """

    rows: int
    tokens: int
    positions: Tensor | None
    mask: Tensor | None
    generation: Generation | None

    @property
    def limit(self) -> int | None:
        """Final number of tokens, virtual ones included, if it is known."""
        running = self.generation
        if running is None or running.max_length is None:
            return None
        return running.max_length + running.virtual_tokens

    def mask_after(self, seen: int) -> Tensor | None:
        """Return the mask of the call's own tokens, where the cache holds ``seen`` before them."""
        if self.mask is None or self.mask.shape[-1] < self.tokens:
            return None
        if self.mask.shape[-1] == self.tokens:
            return self.mask
        own = self.mask[:, seen : seen + self.tokens]
        return own if own.shape[-1] == self.tokens else None


def shape_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of rows of a call and of tokens in each."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "input_values"):
        if arguments.get(name) is not None:
            return arguments[name].shape[0], arguments[name].shape[1]
    return 1, 0

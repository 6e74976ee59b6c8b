"""The inputs that all tasks of an evaluation share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.text import tokenize

Advance = Callable[[int], None]
"""Called with the number of samples just finished."""


@dataclass(frozen=True, eq=False)
class Bench:
    """The inputs that all tasks of an evaluation share.

    Args:
        tokenizer: The model's tokenizer.
        text: Text for perplexity and for `TextPasskey`, or its tokens, ``(tokens,)``.
        longest: Longest context length, in tokens.
        trained: The model's trained length; only the tasks that depend on it need it.
        windows: Windows of text per length.
        targets: Tokens scored at the end of each window.
        samples: Samples per length, and per depth for tasks with depths.
        seed: Seed for all sampling.
        processor: The model's processor, for tasks that show images.
    """

    tokenizer: Any
    text: str | Tensor
    longest: int
    trained: int = 0
    windows: int = 32
    targets: int = 64
    samples: int = 50
    seed: int = 0
    processor: Any = None

    @cached_property
    def ids(self) -> Tensor:
        """Tokens of the text, ``(tokens,)``."""
        if isinstance(self.text, Tensor):
            return self.text
        if not self.text:
            raise RopeError(
                "perplexity and the passkey task need a long text: --text FILE on the command "
                "line, text=... in Python."
            )
        return tokenize(self.tokenizer, self.text)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that start every window: the beginning-of-text token, if there is one."""
        start = getattr(self.tokenizer, "bos_token_id", None)
        return () if start is None else (int(start),)

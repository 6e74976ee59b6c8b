"""The windows in which `RopeHFLM` takes the log-likelihood of a long text."""

from dataclasses import dataclass
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hf_rope_ext.errors import RopeError

TokenRequest = tuple[Any, list[int], list[int]]
"""What is asked for a log-likelihood: lm-eval's key (or None), context, continuation."""


@dataclass(frozen=True)
class Window:
    """How `RopeHFLM` cuts a long text for its perplexity.

    Args:
        length: Tokens of a window, the model's length if None.
        stride: Tokens that are new in each window after the first, scored with all the others
            before them; the window's length if None, which is lm-eval's definition.
    """

    length: int | None = None
    stride: int | None = None

    def cut(self, tokens: list[int], prefix: int, max_length: int) -> list[TokenRequest]:
        """Return the windows of a text, each with the tokens that are scored in it.

        Raises:
            RopeError: If window or stride is not between 1 and what it may be.
        """
        length = _within("window", self.length, max_length)
        stride = _within("stride", self.stride, length)
        windows = get_rolling_token_windows(tokens, prefix, length, length - stride + 1)
        return [(None, *make_disjoint_window(pair)) for pair in windows]


def _within(name: str, value: int | None, most: int) -> int:
    if value is None:
        return most
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RopeError(f"{name} must be a number of tokens from 1 to {most}, got {value!r}.")
    return value

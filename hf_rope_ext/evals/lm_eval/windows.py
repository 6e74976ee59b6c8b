"""Windows for rolling log-likelihoods of long texts."""

from dataclasses import dataclass
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hf_rope_ext.checks import require_integer

TokenRequest = tuple[Any, list[int], list[int]]
"""A log-likelihood request: lm-eval's key (or None), context, continuation."""


@dataclass(frozen=True)
class Window:
    """How `RopeHFLM` splits a long text.

    Args:
        length: Window length in tokens; None for the model's length.
        stride: New tokens scored in each window after the first, the others being their context;
            None for the window length, which is lm-eval's definition.
    """

    length: int | None = None
    stride: int | None = None

    def cut(self, tokens: list[int], prefix: int, max_length: int) -> list[TokenRequest]:
        """Return the windows of a text, each with the tokens to score.

        Raises:
            RopeError: If window or stride is out of range.
        """
        length = max_length if self.length is None else self.length
        require_integer("window", length, 1, max_length, unit="tokens")
        stride = length if self.stride is None else self.stride
        require_integer("stride", stride, 1, length, unit="tokens")
        windows = get_rolling_token_windows(tokens, prefix, length, length - stride + 1)
        return [(None, *make_disjoint_window(pair)) for pair in windows]

"""Read and tokenize text."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import RopeError


def read_text(path: str | Path) -> str:
    """Return the content of a text file, which is read once until it changes.

    Raises:
        RopeError: If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        found = Path(path).stat()
        text = _read(str(path), (found.st_mtime_ns, found.st_size, found.st_ino))
    except (OSError, UnicodeDecodeError) as error:
        raise RopeError(f"cannot read the text {str(path)!r}: {error}") from error
    if not text.strip():
        raise RopeError(f"the text {str(path)!r} is empty.")
    return text


@lru_cache(maxsize=8)
def _read(path: str, version: tuple[int, int, int]) -> str:
    return Path(path).read_text(encoding="utf-8-sig")  # a byte-order mark is no text


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a text without special tokens, int64, ``(tokens,)``."""
    # only windows of the text are run, so the tokenizer's length warning does not apply
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def require_tokens(ids: Tensor, needed: int, what: str) -> None:
    """Check that a text has enough tokens.

    Raises:
        RopeError: If it has fewer than ``needed``.
    """
    if len(ids) < needed:
        raise RopeError(
            f"the text has {len(ids)} tokens, but {what} needs {needed}; use a longer text or "
            f"shorter lengths."
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a prompt, including special tokens that the tokenizer adds."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def require_answer(tokenizer: Any, answer: str, name: str) -> None:
    """Check that a tokenizer can encode an answer.

    Raises:
        RopeError: If it cannot, so that either no model or every model would be right.
    """
    ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        raise RopeError(
            f"{name}: this tokenizer has no tokens for the answer {answer!r}, so its models cannot "
            f"be scored; omit the task."
        )


def encode_pair(tokenizer: Any, context: str, target: str) -> tuple[list[int], int]:
    """Return the tokens of context and target together, and the number of target tokens.

    Whitespace at the end of the context counts as target: tokenizers attach it to the next word.
    """
    ids = encode(tokenizer, context + target)
    return ids, len(ids) - len(encode(tokenizer, context.rstrip()))

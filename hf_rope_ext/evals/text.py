"""Long text as tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import RopeError


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        RopeError: If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RopeError(f"cannot read the text {str(path)!r}: {error}") from error
    if not text.strip():
        raise RopeError(f"the text {str(path)!r} is empty.")
    return text


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a text without special ones, int64, shape ``(tokens,)``."""
    # pieces are joined in what follows, so the tokenizer's length limit says nothing here
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def require_tokens(ids: Tensor, needed: int, what: str) -> None:
    """Check that a text is long enough.

    Raises:
        RopeError: If it is not.
    """
    if len(ids) < needed:
        raise RopeError(
            f"the text has {len(ids)} tokens, but {what} needs {needed}; give a longer text or "
            f"shorter lengths."
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a prompt with the special ones the tokenizer puts around a text."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def require_answer(tokenizer: Any, answer: str, name: str) -> None:
    """Check that a tokenizer can write an answer.

    Raises:
        RopeError: If it has no tokens for it, so that no model could be right, or all would be.
    """
    ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        raise RopeError(
            f"{name}: this tokenizer has no tokens for the answer {answer!r}, so no model with it "
            f"can be scored; leave the task out."
        )


def encode_pair(tokenizer: Any, context: str, target: str) -> tuple[list[int], int]:
    """Return the tokens of context and target together, and how many of them are the target.

    White space at the context's end counts to the target, as tokenizers put it before a word.
    """
    kept = context.rstrip()
    whole = encode(tokenizer, context + target)
    return whole, len(whole) - len(encode(tokenizer, kept))

"""Generate answers by what a task says, and not by the checkpoint's habits.

``generate`` fills whatever a call leaves open from the ``generation_config`` of the checkpoint: a
repetition penalty, banned n-grams or a temperature change what "the most likely token" is. For an
evaluation only its special tokens count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SPECIAL = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
"""Entries of a ``generation_config`` that say what tokens mean, not how they are chosen."""


def answer_config(model: nn.Module, tokenizer: Any, **settings: Any) -> Any:
    """Return the ``GenerationConfig`` of an answer: greedy, up to the model's end of text.

    Args:
        model: A model, whose end-of-text tokens count before the tokenizer's.
        tokenizer: Its tokenizer.
        **settings: Entries of the ``GenerationConfig``, such as ``max_new_tokens``.
    """
    from transformers import GenerationConfig

    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    return GenerationConfig(
        **{"do_sample": False, "eos_token_id": end, "pad_token_id": padding(tokenizer), **settings}
    )


def padding(tokenizer: Any) -> int:
    """Return a token to fill rows with; attention masks hide it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


@contextmanager
def without_habits(model: nn.Module) -> Iterator[None]:
    """Take everything but special tokens out of the ``generation_config`` for a ``with`` block."""
    from transformers import GenerationConfig

    blank = GenerationConfig().to_dict()
    owners = [
        (part, own)
        for part in model.modules()
        if isinstance(own := vars(part).get("generation_config"), GenerationConfig)
    ]
    try:
        for part, own in owners:
            kept = {
                name: value
                for name, value in vars(own).items()
                # an entry that no GenerationConfig has is one that the model's own code reads
                if name in SPECIAL or not (name in blank or name.startswith("_"))
            }
            part.generation_config = GenerationConfig(**kept)
        yield
    finally:
        for part, own in owners:
            part.generation_config = own

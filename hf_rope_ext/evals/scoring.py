"""Score given tokens in one forward, without keeping the logits of all positions."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = 1 << 24
"""Numbers in one piece of logits at most: 64 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Scores:
    """How a model rates the last tokens of a batch of sequences.

    Args:
        log_probs: Natural log-probability of each, float64, on the CPU, ``(batch, targets)``.
        greedy: Whether each is the most likely token, bool, on the CPU, ``(batch, targets)``.
    """

    log_probs: Tensor
    greedy: Tensor


@torch.inference_mode()
def score_last(
    model: nn.Module, input_ids: Tensor, targets: int, chunk: int | None = None
) -> Scores:
    """Return the scores of the last tokens of each row, each given all before it.

    Logits are made for the scored positions alone and, where these are many, piece by piece from
    one forward through the layers, so memory does not grow with length times vocabulary.

    Args:
        model: A causal language model.
        input_ids: ``(batch, seq)``.
        targets: How many tokens at the end of each row are scored, less than ``seq``.
        chunk: Positions of a piece; chosen by the size of the vocabulary if not given.
    """
    device = next(model.parameters()).device
    ids = input_ids.to(device)
    wanted = ids[:, -targets:]
    if not keeps_logits(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, -targets - 1 : -1]
        return _scores([logits], wanted)
    trunk = _trunk(model)
    if trunk is None:
        chunk = targets
    elif chunk is None:
        chunk = max(LOGITS_AT_ONCE // (len(ids) * _vocabulary(model)), 16)
    if trunk is None or targets <= chunk:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=targets + 1).logits
        return _scores([logits[:, :-1]], wanted)
    first = ids.shape[1] - targets - 1
    positions = torch.split(torch.arange(first, ids.shape[1] - 1, device=device), chunk)
    with _layers_run_once(model, trunk, ids) as head:
        return _scores((head(piece) for piece in positions), wanted)


def keeps_logits(model: nn.Module) -> bool:
    """Return whether a model can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(_language_model(model).forward).parameters


def _language_model(model: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def _trunk(model: nn.Module) -> nn.Module | None:
    """Return the part of a model that makes hidden states; None if there is no such part."""
    inner = _language_model(model)
    trunk = getattr(inner, "base_model", None)
    return trunk if isinstance(trunk, nn.Module) and trunk is not inner else None


def _vocabulary(model: nn.Module) -> int:
    config = _language_model(model).config
    return int(config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


@contextmanager
def _layers_run_once(
    model: nn.Module, trunk: nn.Module, ids: Tensor
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function from positions to logits after one forward through the layers.

    While it is in use, the layers answer with what they returned in that forward, so the model's
    own code turns hidden states into logits (scaling and soft caps included).
    """
    kept: list[Any] = []
    handle = trunk.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    own = trunk.__dict__.get("forward")
    trunk.forward = lambda *inputs, **named: kept[0]
    try:
        yield (
            lambda positions: model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        )
    finally:
        if own is None:
            del trunk.forward
        else:
            trunk.forward = own


def _scores(pieces: Any, wanted: Tensor) -> Scores:
    found, greedy, first = [], [], 0
    for logits in pieces:
        tokens = wanted[:, first : first + logits.shape[1]].to(logits.device)
        wide = logits.float()
        # log_softmax would be as large as the logits
        chosen = wide.gather(-1, tokens[..., None])[..., 0]
        found.append((chosen.double() - wide.logsumexp(dim=-1).double()).cpu())
        greedy.append((logits.argmax(-1) == tokens).cpu())
        first += logits.shape[1]
    return Scores(torch.cat(found, dim=1), torch.cat(greedy, dim=1))

"""Score given tokens in one forward, without keeping the logits of all positions."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
def score_last(model: nn.Module, input_ids: Tensor, targets: int) -> Scores:
    """Return the scores of the last tokens of each row, each given all before it.

    Logits are made for the scored positions alone, so memory does not grow with length times
    vocabulary.

    Args:
        model: A causal language model.
        input_ids: ``(batch, seq)``.
        targets: How many tokens at the end of each row are scored, less than ``seq``.
    """
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {"input_ids": input_ids.to(device), "use_cache": False}
    if _keeps_logits(model):
        arguments["logits_to_keep"] = targets + 1
    logits = model(**arguments).logits[:, -targets - 1 : -1]
    wanted = arguments["input_ids"][:, -targets:]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    found = log_probs.gather(-1, wanted[..., None])[..., 0]
    return Scores(found.double().cpu(), (logits.argmax(-1) == wanted).cpu())


def _keeps_logits(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters

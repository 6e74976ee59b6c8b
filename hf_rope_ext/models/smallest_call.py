"""The smallest inputs that a model runs on."""

import inspect
from typing import Any

import torch
from torch import nn

from hf_rope_ext.models.family import family_of


def arguments_for(runner: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """Return inputs of a few positions, in the alternatives to try."""
    family = family_of(runner.config)
    if family.probe is not None:
        return [family.probe(runner)]
    accepted = inspect.signature(runner.forward).parameters
    tokens = torch.tensor([[1, 2]], device=device)
    arguments: dict[str, Any] = {"input_ids": tokens}
    if "input_ids" not in accepted and "input_values" in accepted:
        arguments = {"input_values": torch.zeros(1, 4000, device=device)}
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if "decoder_input_ids" in accepted:
        return [{**arguments, "decoder_input_ids": tokens}, arguments]
    return [arguments]

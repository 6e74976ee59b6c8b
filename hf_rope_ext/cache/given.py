"""What a model was given, for the text model inside it and for the cache that it fills.

The outer models of a text model hand it embeddings in place of images, and other masks than they
were given. Two hooks on each of them keep the padding mask for the planner, and write on the cache
what it was filled with beside token ids, since ids cannot give that back.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.models import host
from hf_rope_ext.rotary.request_plan import CachePlan, plan_of
from hf_rope_ext.rotary.running import RUNNING, Given, announced_generation, innermost


class Keep:
    """The forward hooks of one model.

    Args:
        model: The model.
        planners: The planners of the text models inside.
    """

    def __init__(self, model: nn.Module, planners: Sequence[object]) -> None:
        self.planners = planners
        self.parameters = tuple(inspect.signature(model.forward).parameters)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the arguments of the outermost call (forward pre-hook)."""
        if innermost(RUNNING.given, self.planners[0]) is None:
            arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
            RUNNING.given = Given(self.planners, model, arguments, RUNNING.given)

    def end(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Write the content of the outermost call on its cache (forward hook)."""
        given = RUNNING.given
        if given is None or given.model is not model:
            return
        RUNNING.given = given.outer
        cache = None if output is None else host.output_cache(output)
        plan = None if cache is None else plan_of(cache)
        if plan is None:
            return
        arguments = given.arguments
        generation = innermost(announced_generation(), self.planners[0])
        if generation is not None and generation.models:
            # what `generate` was given, and not what it makes of that for its calls
            if generation.is_noted:
                return
            arguments, generation.is_noted = generation.arguments, True
        for name, value in arguments.items():
            numbers = _content(name, value)
            if numbers is not None:
                known = plan.content.setdefault(name, [])
                known.append((len(numbers), _fingerprint(numbers)))


def padding_mask(given: Given | None, *, decodes: bool) -> Tensor | None:
    """Return the padding mask of a call, ``(batch, seq)``; None without one.

    Args:
        given: The call.
        decodes: Whether it is asked for by a decoder, which may have an encoder beside it.
    """
    arguments = {} if given is None else given.arguments
    mask = arguments.get("decoder_attention_mask") if decodes else None
    if mask is None and not (decodes and "decoder_input_ids" in arguments):
        mask = arguments.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def can_refill(plan: CachePlan, arguments: Mapping[str, Any]) -> bool:
    """Return whether the arguments of a request hold all that a cache was filled with."""
    return all(
        _starts_with(_content(name, arguments.get(name)), known)
        for name, known in plan.content.items()
    )


def _content(name: str, value: Any) -> Tensor | None:
    """Return the numbers in an argument that ids, masks and positions cannot give back.

    What comes from an encoder is part of every request, and not of its text.
    """
    if name.startswith("encoder_") or name.endswith(("mask", "position_ids", "labels")):
        return None
    numbers = list(_numbers(value))
    return torch.cat(numbers) if numbers else None


def _numbers(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach().flatten()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)


def _starts_with(numbers: Tensor | None, known: Sequence[tuple[int, Tensor]]) -> bool:
    for size, fingerprint in known:
        if numbers is None or len(numbers) < size:
            return False
        part, numbers = numbers[:size], numbers[size:]
        if not torch.equal(_fingerprint(part), fingerprint):
            return False
    return True


def _fingerprint(numbers: Tensor) -> Tensor:
    """Return two sums over numbers, which stay on the device."""
    precise = torch.float32 if numbers.device.type == "mps" else torch.float64
    numbers = numbers.to(precise)
    order = torch.arange(1, len(numbers) + 1, device=numbers.device, dtype=precise).sqrt()
    return torch.stack([numbers.sum(), numbers @ order])

"""Rotate cached keys from one plan's angles to another's.

A cached key is ``R(position * inv_freq) k``, so rotating it by the difference of two plans' angles
moves it from one plan to the other. How a family's keys rotate is measured on the model
(`hf_rope_ext.rotary.pairs`). The first layer's keys become exact; deeper layers' keys come from
hidden states computed under the older plan and keep a residual.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import Scale
from hf_rope_ext.models import host
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.pairs import PairReader, PairRotation
from hf_rope_ext.rotary.request_plan import CachePlan

PARTS = ("keys", "values")
"""Tensors of a cache layer; latent attention keeps its rotated part in either of them."""


KeyLayout = Mapping[tuple[int, str], PairRotation]
"""Rotations by cache layer and tensor; tensors that do not rotate are left out."""


def turn_keys(
    cache: Any, layout: KeyLayout, plan: CachePlan, frequencies: Mapping[str, tuple[Tensor, Scale]]
) -> None:
    """Rotate the tensors of a cache from a plan's frequencies to others, in float32.

    Args:
        cache: transformers' cache.
        layout: How its tensors rotate.
        plan: The plan under which it was filled, with the positions of its tokens.
        frequencies: The new frequencies and scaling, by rotary module and layer type.

    Raises:
        RopeError: If the cache keeps its keys in a form that cannot be rotated; nothing is changed.
    """
    for layer in cache.layers:
        if host.is_quantized(layer):
            raise RopeError(
                f"{type(layer).__name__} keeps quantized keys, which cannot be rotated to a longer "
                f"plan; nothing was changed. Run the loop in `planned(max_length)`."
            )
    assert plan.positions is not None
    mixed = any(rotation.mixes_axes() for rotation in layout.values())
    if mixed and bool((plan.positions != plan.positions[:1]).any()):
        raise RopeError(
            "the two coordinates of a pair rotate by different axes of an image's position here, "
            "so its keys cannot be rotated to a longer plan; nothing was changed. Run the loop in "
            "`planned(max_length)`."
        )
    for (index, part), rotation in layout.items():
        held = getattr(cache.layers[index], part)
        setattr(
            cache.layers[index],
            part,
            _turn(held, rotation, plan, *_difference(rotation.key, plan, frequencies)),
        )


def _difference(
    key: str, plan: CachePlan, frequencies: Mapping[str, tuple[Tensor, Scale]]
) -> tuple[Tensor, Scale]:
    old, old_scaling = plan.frequencies[key]
    new, scaling = frequencies[key]
    return new.double() - old.double(), scaling / old_scaling


def _turn(
    held: Tensor, rotation: PairRotation, plan: CachePlan, step: Tensor, ratio: Scale
) -> Tensor:
    """Return a cached tensor, ``(batch, heads, seq, width)``, rotated by ``step`` per position."""
    assert plan.positions is not None
    device = held.device
    # a layer with a sliding window holds the last tokens only
    positions = plan.positions[..., -held.shape[-2] :].to(device, torch.float64)
    if positions.ndim == 2:
        positions = positions[None]
    per_pair = step.to(device).reshape(-1, 1, step.shape[-1])[..., rotation.pair.to(device)]
    along = positions[rotation.axis.to(device)].movedim(0, -1)
    angles = (along * per_pair)[:, None]
    cos, sin = angles.cos().float(), angles.sin().float()
    numbers = held.float()
    turned = (
        cos * numbers + sin * rotation.gain.to(device) * numbers[..., rotation.partner.to(device)]
    )
    if rotation.is_scaled:
        turned = turned * (ratio[..., None].to(device) if isinstance(ratio, Tensor) else ratio)
    total = plan.positions.shape[-1]
    is_rotated = torch.arange(total - held.shape[-2], total, device=device) >= plan.learned
    turns = rotation.turns.to(device) & is_rotated[:, None]
    return torch.where(turns, turned, numbers).to(held.dtype)


def read_layout(model: nn.Module, rotaries: list[ExtendedRotary]) -> KeyLayout:
    """Measure how a text model's cached keys rotate.

    Args:
        model: The text model; it is run on a few single tokens and left as it was.
        rotaries: Its rotary embeddings.

    Raises:
        RopeError: If its keys do not behave like rotated keys, or the model cannot be run this way.
    """
    if any(
        rotation.layout is not None and rotation.layout.per_head
        for rotary in rotaries
        for rotation in rotary.rotations.values()
    ):
        raise RopeError(
            "the cached keys of heads with different axes cannot be rotated to a longer plan; run "
            "the loop in `planned(max_length)`."
        )
    observe = partial(_cached, model)
    try:
        return PairReader(model, rotaries, observe).rotations()  # type: ignore[return-value]
    except RopeError as error:
        raise RopeError(
            f"cached keys cannot be rotated to a longer plan: {error}; run the loop in "
            f"`planned(max_length)`."
        ) from error
    except Exception as error:
        raise RopeError(
            f"could not run {type(model).__name__} on single tokens to measure how its cached "
            f"keys rotate ({type(error).__name__}: {error}); run the loop in `planned(max_length)`."
        ) from error


def _cached(model: nn.Module, arguments: dict[str, Any]) -> dict[Hashable, Tensor]:
    """Return what is cached for tokens, by layer and part."""
    cache = host.new_cache(model.config)
    model.forward(**arguments, use_cache=True, **host.pass_cache(model, cache))
    cached: dict[Hashable, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        for part in PARTS:
            held = getattr(layer, part, None)
            if isinstance(held, Tensor) and held.ndim == 4:
                cached[index, part] = held.reshape(-1, held.shape[-1]).float().cpu()
    return cached

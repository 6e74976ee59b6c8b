"""The axial rotary embeddings of vision towers, for images larger than in training.

A position is a patch's row and column in the grid, and each axis rotates its own coordinates of a
head. Families share one set of frequencies between axes and compute ``position * inv_freq`` by
broadcasting, so frequencies of shape ``(axes, pairs)`` give each axis its own through their code.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.changes import SetAttributes
from hf_rope_ext.errors import AlreadyScaledError, MethodParameterError, UnsupportedModelError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods import Method, PerAxis, method_record
from hf_rope_ext.models.family import Config, setting
from hf_rope_ext.models.find import find_towers
from hf_rope_ext.models.rope_config import RECORD, remedy
from hf_rope_ext.models.sites import RopeSite, axial_site
from hf_rope_ext.rotary.axes import assign_axes, read_pairs
from hf_rope_ext.rotary.rotation import Rotation

TOWER_AXES = ("h", "w")
"""Axes of a patch's position in most families."""


@dataclass(frozen=True, eq=False)
class AxialRotation(Rotation):
    """One set of axial frequencies of a vision tower.

    Args:
        names: The axes of a position, in the order of its coordinates.
    """

    names: tuple[str, ...] = TOWER_AXES

    def _planned(
        self, plan: Callable[[RopeGeometry], FrequencyPlan], geometry: RopeGeometry
    ) -> FrequencyPlan:
        """Return the plan; ``(axes, pairs)`` where axes share pairs but not the method."""
        if geometry.axes is not None or not isinstance(self.method, PerAxis):
            return plan(geometry)
        plans = [plan(replace(geometry, axes=(name,) * geometry.pairs)) for name in self.names]
        return FrequencyPlan(
            torch.stack([one.inv_freq for one in plans]),
            max(float(one.attention_scaling) for one in plans),
        )


def read_towers(
    model: nn.Module, original_max_position_embeddings: int | None = None
) -> list[RopeSite]:
    """Return every set of axial rotary frequencies in the vision towers of a model.

    Args:
        model: Any module around a transformers model.
        original_max_position_embeddings: The trained length: patches along the longer side of the
            largest image. When not given, ``image_size`` over ``patch_size`` of the vision config.

    Raises:
        RopeError: If there is none, or its geometry or trained length cannot be determined.
    """
    sites = []
    for rotary in find_towers(model):
        if hasattr(rotary.config, RECORD):
            raise AlreadyScaledError(
                f"{rotary.path}: the vision config holds the record of a patch that is not in the "
                f"model; load it with load_pretrained. Nothing was changed."
            )
        if rotary.live(None).is_meta:
            raise UnsupportedModelError(
                f"{rotary.path} is on the meta device, so there are no frequencies yet; load the "
                f"weights first. Nothing was changed."
            )
        trained = original_max_position_embeddings or trained_side(rotary.config)
        if trained is None:
            raise MethodParameterError(
                f"{rotary.path}: the vision config (model_type={rotary.config.model_type!r}) has "
                f"no image_size, so it does not say how large images were in training; pass "
                f"original_max_position_embeddings, the patches along the longer side of the "
                f"largest. Nothing was changed."
            )
        site = axial_site(rotary, trained)
        # each pair can belong to one axis, as in M-RoPE (Pixtral)
        site = assign_axes(site, dict(zip(tower_axes(site), pairs_by_axis(site), strict=True)))
        sites.append(site)
    return sites


def trained_side(config: Config) -> int | None:
    """Return the largest trained image's longer side in patches, if the config gives it."""
    image, patch = setting(config, "image_size"), setting(config, "patch_size")
    if not image or not patch:
        return None
    return _side(image) // _side(patch)


def tower_axes(site: RopeSite) -> tuple[str, ...]:
    """Return the names of the coordinates of a patch's position."""
    return site.family.axes or TOWER_AXES


def with_axis_names(geometry: RopeGeometry, names: tuple[str, ...]) -> RopeGeometry:
    """Return the geometry with the axes' names, for checking arguments given by axis."""
    return geometry if geometry.axes is not None else replace(geometry, axes=names)


def pairs_by_axis(site: RopeSite) -> list[list[int]]:
    """Return the indices of the stored pairs that each axis rotates."""
    points = torch.eye(len(tower_axes(site)))
    return read_pairs(site, [shape_position(site.rotary.original, point) for point in points])


def shape_position(original: Any, point: Tensor) -> Tensor:
    """Return a position ``(axes,)`` in the shape the family takes, with or without a batch."""
    try:
        original(point.new_zeros(1, 1, 1), point.new_zeros(1, 1, len(point)))
    except IndexError:
        return point[None]
    return point[None, None]


def tower_changes(
    sites: Sequence[RopeSite], method: Method, settings: Mapping[str, Any]
) -> list[SetAttributes]:
    """Return the config changes for a patched vision tower.

    Stock code can read another base, but knows no other scaling of a vision tower: at the
    ``rope_type`` that those get it stops.

    Args:
        sites: The sites that the method extends.
        method: What extends them.
        settings: Further entries of the record.
    """
    changes = []
    for config in {id(site.config): site.config for site in sites}.values():
        geometry = next(site.geometry for site in sites if site.config is config)
        before = dict(config.rope_parameters)
        stock = method.rope_parameters(geometry)
        if stock is not None and stock["rope_type"] == "default":
            after = {**before, **stock, "rope_type": before["rope_type"]}
        else:
            after = {**before, "rope_type": remedy(method)}
        record = {
            "version": 1,
            "target": "vision",
            "method": method_record(method),
            "original_max_position_embeddings": geometry.original_max_position_embeddings,
            "temperature": "rotation",
            **settings,
            "unscaled": {"rope_parameters": before},
        }
        changes.append(SetAttributes(config, {"rope_parameters": after, RECORD: record}))
    return changes


def smallest_images(tower: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """Return candidate inputs of one small image for running a vision tower."""
    config, accepted = tower.config, inspect.signature(tower.forward).parameters
    dtype = next(part.dtype for part in tower.parameters() if part.is_floating_point())
    side = _side(setting(config, "patch_size", 14))
    channels = setting(config, "num_channels") or setting(config, "in_channels") or 3

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if "grid_thw" in accepted:
        name = "pixel_values" if "pixel_values" in accepted else "hidden_states"
        inputs: dict[str, Any] = {"grid_thw": torch.tensor([[1, 4, 4]], device=device)}
        if "merge_sizes" in accepted:
            inputs["merge_sizes"] = torch.tensor([2], device=device)
        shapes: list[tuple[int, ...]] = [(16, frames * channels * side**2) for frames in (2, 1)]
        shapes += [(16, channels, side, side), (1, 16, channels, side, side)]
        return [{name: zeros(*shape), **inputs} for shape in shapes]
    if "pixel_position_ids" in accepted:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).to(device)[None]
        return [{"pixel_values": zeros(1, 16, channels * side**2), "pixel_position_ids": places}]
    sizes = {4 * side, _side(setting(config, "image_size", 4 * side))}
    images: list[dict[str, Any]] = [
        {"pixel_values": zeros(1, channels, size, size)} for size in sorted(sizes)
    ]
    if "image_sizes" in accepted:
        for image in images:
            image["image_sizes"] = torch.tensor([image["pixel_values"].shape[-2:]], device=device)
    return images


def _side(size: Any) -> int:
    """Return the longer side of a size given as a number, a pair or a mapping."""
    if isinstance(size, Mapping):
        size = tuple(size.values())
    return int(max(size)) if isinstance(size, Sequence) else int(size)

"""Find out which position axis each pair rotates by, from the family's own code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_rope_ext.errors import UnsupportedModelError
from hf_rope_ext.methods import NoScaling
from hf_rope_ext.models.find import Rotary
from hf_rope_ext.models.host import mrope_section, pick_axes
from hf_rope_ext.models.sites import RopeSite
from hf_rope_ext.positions.placement import AXES
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.rotation import Rotation


def read_axes(site: RopeSite) -> RopeSite:
    """Return the site with the axis of each pair in its geometry, where positions have several.

    Raises:
        UnsupportedModelError: If the family's own code cannot run.
    """
    names = axis_names(site.rotary, site.label)
    if len(names) < 2:
        return site
    places = torch.eye(len(names))[..., None, None]
    try:
        turned = read_pairs(site, places)
    except RuntimeError as error:
        section, pairs = mrope_section(site.rotary.original, site.label), site.geometry.pairs
        raise UnsupportedModelError(
            f"{site.path}: mrope_section {list(section)!r} covers {sum(section)} pairs, but "
            f"{pairs} rotate, so the model cannot run ({error}). Nothing was changed; put the "
            f"model's own mrope_section into its config."
        ) from error
    return assign_axes(site, dict(zip(names, turned, strict=True)))


def assign_axes(site: RopeSite, turned: Mapping[str, Sequence[int]]) -> RopeSite:
    """Return the site with the axis of each pair in its geometry, if every pair has exactly one.

    Args:
        site: The site.
        turned: Indices of the stored pairs that rotate by each axis.
    """
    pairs = range(site.geometry.pairs)
    if sorted(pair for own in turned.values() for pair in own) != list(pairs):
        return site  # such as HunYuan-VL, where the coordinates of a pair have different axes
    order = site.pair_order or pairs
    owners = {order[stored]: name for name, own in turned.items() for stored in own}
    axes = tuple(owners[pair] for pair in pairs)
    return replace(site, geometry=replace(site.geometry, axes=axes))


def read_pairs(site: RopeSite, places: Iterable[Tensor]) -> list[list[int]]:
    """Return, for each position, the indices of the stored pairs it rotates.

    The family's own code is run at positions that are 1 on one axis and 0 on the others, with
    frequencies whose cosines are all different: the pairs whose cosines appear in the output
    rotate by that axis. No layout has to be known by name.
    """
    # far enough from each other, and from 1
    cosines = torch.linspace(0.95, 0.05, site.geometry.pairs)
    rotation = Rotation(NoScaling(), site.geometry, site.inv_freq)
    rotary = ExtendedRotary(site.rotary.original, {site.label: rotation}, None)
    layer_type = () if site.label is None else (site.label,)
    indices = []
    for place in places:
        x = torch.zeros(1, 1, 1)
        cos, _ = rotary.run_family_forward(site.label, cosines.acos(), 1.0, x, place, *layer_type)
        cos = pick_axes(site.rotary.original, site.label, cos)
        turned = (cosines[:, None] - cos.flatten()[None, :]).abs().amin(dim=1) < 1e-4
        indices.append(turned.nonzero().flatten().tolist())
    return indices


def axis_names(rotary: Rotary, label: str | None) -> tuple[str, ...]:
    """Return the names of the position axes that a rotary module takes."""
    family = rotary.family
    section = mrope_section(rotary.original, label)
    if section:
        return (family.axes or AXES)[-len(section) :]
    # a module that could have sections, but has none, takes plain positions
    if family.axes and not hasattr(rotary.original, "mrope_section"):
        return family.axes
    return ("position",)

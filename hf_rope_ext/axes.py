"""Which axis of the position each pair turns by, read off a family's own code."""

from dataclasses import replace
from typing import Any

import torch

from hf_rope_ext.families import Rotary
from hf_rope_ext.layouts import AXES
from hf_rope_ext.methods import NoScaling
from hf_rope_ext.rotary import ExtendedRotary, Rotation
from hf_rope_ext.sites import RopeSite


def with_axes(site: RopeSite) -> RopeSite:
    """Return a site whose geometry says by which axis each pair turns, where there are several.

    The family's code computes one position that is 1 on one axis and 0 on the others. A pair whose
    cosine comes out turned turns by that axis. Thus no layout has to be known by name.
    """
    names = axis_names(site.rotary, site.label)
    if len(names) < 2:
        return site
    geometry = site.geometry
    # cosines far enough from each other, and from 1, to tell pairs apart
    cosines = torch.linspace(0.95, 0.05, geometry.pairs)
    rotation = Rotation(NoScaling(), geometry, site.inv_freq)
    rotary = ExtendedRotary(site.rotary.original, {site.label: rotation}, None)
    layer_type = () if site.label is None else (site.label,)
    owners: list[list[str]] = [[] for _ in range(geometry.pairs)]
    for row, name in enumerate(names):
        positions = torch.zeros(len(names), 1, 1)
        positions[row] = 1
        cos, _ = rotary.laid_out(
            site.label, cosines.acos(), 1.0, torch.zeros(1, 1, 1), positions, *layer_type
        )
        turned = (cosines[:, None] - cos.flatten()[None, :]).abs().amin(dim=1) < 1e-4
        for stored in turned.nonzero().flatten().tolist():
            order = site.pair_order
            owners[stored if order is None else order[stored]].append(name)
    if any(len(own) != 1 for own in owners):
        return site  # the two coordinates of a pair turn by different axes (HunYuan-VL)
    return replace(site, geometry=replace(geometry, axes=tuple(own for (own,) in owners)))


def axis_names(rotary: Rotary, label: str | None) -> tuple[str, ...]:
    """Return the names of the rows of the positions that a rotary module takes."""
    family = rotary.family
    if not hasattr(rotary.original, "mrope_section"):
        return family.axes or ("position",)
    sections: Any = rotary.original.mrope_section
    if isinstance(sections, dict):
        sections = sections[label]
    return (family.axes or AXES)[-len(sections) :] if sections else ("position",)

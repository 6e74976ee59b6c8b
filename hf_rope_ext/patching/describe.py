"""Describe the RoPE in force in a model, from its live buffers rather than its config."""

import io
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.methods import PerAxis, method_record
from hf_rope_ext.models.sites import RopeSite, read_sites
from hf_rope_ext.models.temperature import effective_logit_factor
from hf_rope_ext.patching.advice import advice
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.installed import Resolved, patch_of
from hf_rope_ext.rotary.request_plan import request_plan

SAME = 1e-6
"""Relative difference of two float32 frequencies that are the same."""


@dataclass(frozen=True)
class SiteDescription:
    """One set of rotary frequencies as it is computed now.

    Args:
        path: Dotted path of the rotary module.
        layer_type: The layer type it serves, None for all.
        axis: The position axis whose pairs are described, None for all.
        scaling: The method in force, or the ``rope_type`` of the model's own config.
        base: ``rope_theta`` as trained.
        rotary_dim: Rotated coordinates of a head.
        head_dim: All coordinates of a head.
        original_max_position_embeddings: Trained length in positions.
        pairs: Number of pairs.
        untouched_pairs: Number of pairs that rotate as in training.
        largest_slowdown: Largest ratio of trained to live frequency; None if a pair rests.
        attention_scaling: What cos and sin are multiplied by.
        logit_factor: The intended factor on attention logits.
        effective_logit_factor: The factor that results in this family.
        sound: Whether the live buffer equals the plan to float32.
        dtype: Dtype of the live buffer.
        device: Device of the live buffer.
    """

    path: str
    layer_type: str | None
    axis: str | None
    scaling: str
    base: float
    rotary_dim: int
    head_dim: int | None
    original_max_position_embeddings: int
    pairs: int
    untouched_pairs: int
    largest_slowdown: float | None
    attention_scaling: float
    logit_factor: float
    effective_logit_factor: float
    sound: bool
    dtype: str
    device: str


@dataclass(frozen=True)
class Description:
    """Result of `describe`; prints as a table.

    Args:
        model_type: The text model's ``model_type``.
        max_position_embeddings: The text config's limit, which generate and lm-eval read.
        modules: Number of rotary modules described.
        sites: Their sets of frequencies.
        notes: Warnings about them.
        method: Name and knobs of the method in force, None if the model is not patched.
        factor: Its factor, if it has one.
        mrope_layout: The M-RoPE layout in place of the trained one, if any.
        visual_positions: How visual tokens are placed, None for the model's own rule.
        vision: The same for the vision towers, None if they are not patched.
    """

    model_type: str
    max_position_embeddings: int | None
    modules: int
    sites: tuple[SiteDescription, ...]
    notes: tuple[str, ...]
    method: dict[str, Any] | None = None
    factor: float | None = None
    mrope_layout: dict[str, Any] | None = None
    visual_positions: dict[str, Any] | None = None
    vision: "Description | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table."""
        from rich.console import Console
        from rich.table import Table

        knobs = {} if self.method is None else dict(self.method)
        title = f"{self.model_type}: {knobs.pop('name', 'not patched')}"
        set_knobs = ", ".join(
            f"{knob}={value}"
            for knob, value in knobs.items()
            if value is not None and knob != "methods"
        )
        table = Table(title=f"{title} {set_knobs}".strip(), title_justify="left")
        for heading in ("path", "scaling", "theta", "rotary/head", "trained", "pairs kept"):
            table.add_column(heading)
        for heading in ("slowest pair", "cos, sin", "logits", "buffer"):
            table.add_column(heading, justify="right")
        for site in self.sites:
            slowdown = site.largest_slowdown
            table.add_row(
                " ".join(
                    [site.path, *(f"[{label}]" for label in (site.layer_type, site.axis) if label)]
                ),
                site.scaling,
                f"{site.base:g}",
                f"{site.rotary_dim}/{site.head_dim or '?'}",
                str(site.original_max_position_embeddings or "?"),
                f"{site.untouched_pairs} of {site.pairs}",
                "at rest" if slowdown is None else f"/ {slowdown:.4g}",
                f"x {site.attention_scaling:.4g}",
                f"x {site.effective_logit_factor:.4g} of {site.logit_factor:.4g}",
                f"{site.dtype} {site.device} {'ok' if site.sound else 'NOT THE PLAN'}",
            )
        text = io.StringIO()
        console = Console(file=text, width=160, no_color=True)
        console.print(table, markup=False)
        if self.max_position_embeddings is not None:
            limit = f"max_position_embeddings {self.max_position_embeddings}"
            console.print(limit, highlight=False)
        for name in ("mrope_layout", "visual_positions"):
            settings = getattr(self, name)
            if settings is not None:
                words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
                console.print(f"{name}: {words}", markup=False, highlight=False)
        for note in self.notes:
            console.print(f"- {note}", markup=False, highlight=False)
        if self.vision is not None:
            console.print(f"\n{self.vision}", markup=False, highlight=False)
        return text.getvalue().rstrip()


def describe(model: nn.Module, request: Any = None) -> Description:
    """Describe the RoPE of the text model, patched or not, and of patched vision towers.

    Args:
        model: The model.
        request: A cache, or an output with one, of a model with a length-dependent method, to
            describe the plan of its longest row. By default, the method's target length.

    Raises:
        RopeError: If the model has no rotary embedding, or the request has no plan.
    """
    patch, towers = patch_of(model), patch_of(model, "vision")
    vision = None if towers is None else _describe_patch(model, towers, None)
    if patch is not None:
        length = None if request is None else _planned_length(request)
        return replace(_describe_patch(model, patch, length), vision=vision)
    try:
        sites = read_sites(model)
    except UnsupportedModelError:
        if vision is None:
            raise
        return vision  # a vision tower on its own
    notes = [f"{site.path}: {site.rebuilt}" for site in sites if site.rebuilt]
    return _describe_sites(sites, [_unpatched(site) for site in sites], notes, vision=vision)


def _describe_patch(model: nn.Module, patch: Resolved, length: int | None) -> Description:
    entries = [entry for site in patch.sites for entry in _patched(site, model, patch, length)]
    method = method_record(patch.method)
    return _describe_sites(
        patch.sites,
        entries,
        advice(patch, model),
        method=method,
        factor=method.get("factor"),
        mrope_layout=None if patch.layout is None else asdict(patch.layout),
        visual_positions=None if patch.visual is None else asdict(patch.visual),
    )


def _describe_sites(
    sites: list[RopeSite], entries: list[SiteDescription], notes: list[str], **patch: Any
) -> Description:
    config = sites[0].config
    return Description(
        model_type=config.model_type,
        max_position_embeddings=getattr(config, "max_position_embeddings", None),
        modules=len({site.path for site in sites}),
        sites=tuple(entries),
        notes=tuple(notes),
        **patch,
    )


def _planned_length(request: Any) -> int:
    plan = request_plan(request)
    if plan is None:
        raise RopeError(
            f"{type(request).__name__} holds no cache planned by a length-dependent method."
        )
    return math.ceil(plan.lengths.max())


def _patched(
    site: RopeSite, model: nn.Module, resolved: Resolved, length: int | None
) -> list[SiteDescription]:
    """Describe what a patched site computes at a length, by default the end of its plan.

    Returns:
        One entry, or one for each axis where axes have methods of their own.
    """
    module = next(
        part
        for part in model.modules()
        if isinstance(part, ExtendedRotary) and part.original is site.rotary.original
    )
    rotation = module.rotations[site.label]
    geometry, method = site.geometry, resolved.method
    target = method.target_length(geometry) or geometry.original_max_position_embeddings
    length = length or target
    live, scaling = module.plan(
        site.label, torch.tensor([[length - 1]], device=next(module.buffers()).device)
    )
    frozen = method.freeze(geometry, length)
    expected, intended = replace(rotation, method=frozen, scales_rotation=True).trained_plan()
    sound = _matches(live.squeeze(), expected)
    in_logits = resolved.temperature == "logits"
    effective = intended**2 if in_logits else effective_logit_factor(site, float(scaling))
    by_axis = dict(method.methods) if isinstance(method, PerAxis) else {None: method}
    return [
        _entry(
            site,
            method_record(axis_method)["name"]
            + (" (follows the request)" if axis_method.length_dependent else ""),
            live,
            float(scaling),
            logit_factors=(intended**2, effective),
            sound=sound,
            axis=axis,
            names=resolved.axes,
        )
        for axis, axis_method in by_axis.items()
    ]


def _unpatched(site: RopeSite) -> SiteDescription:
    live = site.rotary.live(site.label)
    scaling = float(site.rotary.scaling(site.label))
    return _entry(
        site,
        str(site.rope_scaling["rope_type"]),
        live,
        scaling,
        logit_factors=(scaling**2, effective_logit_factor(site, scaling)),
        sound=site.rebuilt is None,
    )


def _entry(
    site: RopeSite,
    scaling_name: str,
    live: Tensor,
    scaling: float,
    *,
    logit_factors: tuple[float, float],
    sound: bool,
    axis: str | None = None,
    names: tuple[str, ...] = (),
) -> SiteDescription:
    slowdown, turning = _slowdown(site, live, axis, names)
    largest = float(slowdown[turning].max())
    geometry = site.geometry
    return SiteDescription(
        path=site.path,
        layer_type=site.label,
        axis=axis,
        scaling=scaling_name,
        base=geometry.base,
        rotary_dim=geometry.rotary_dim,
        head_dim=geometry.head_dim,
        original_max_position_embeddings=geometry.original_max_position_embeddings,
        pairs=turning.numel(),
        untouched_pairs=int((slowdown[turning] - 1).abs().le(SAME).sum() + (~turning).sum()),
        largest_slowdown=largest if math.isfinite(largest) else None,
        attention_scaling=scaling,
        logit_factor=logit_factors[0],
        effective_logit_factor=logit_factors[1],
        sound=sound,
        dtype=str(live.dtype).removeprefix("torch."),
        device=str(live.device),
    )


def _slowdown(
    site: RopeSite, live: Tensor, axis: str | None, names: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Return trained over live frequencies, and which pairs rotate in training, by axis or all."""
    slowdown = site.inv_freq.double() / live.cpu().double().squeeze()
    turning = (site.inv_freq > 0).expand_as(slowdown)
    if axis is not None and slowdown.ndim == 1:
        order = site.pair_order or range(site.geometry.pairs)
        chosen = torch.tensor([(site.geometry.axes or ())[pair] == axis for pair in order])
        return slowdown[chosen], turning[chosen]
    if slowdown.ndim == 2:  # frequencies by axis, equal where there is one method
        row = 0 if axis is None else names.index(axis)
        return slowdown[row], turning[row]
    return slowdown, turning


def _matches(live: Tensor, expected: Tensor) -> bool:
    return torch.allclose(live.cpu().double(), expected.double(), rtol=SAME, atol=0.0)

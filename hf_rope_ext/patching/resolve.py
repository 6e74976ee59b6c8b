"""Check the arguments of `patch_model` against a model and resolve everything it will change."""

import math
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import (
    AlreadyScaledError,
    MethodParameterError,
    UnsupportedModelError,
)
from hf_rope_ext.methods import (
    Method,
    NoScaling,
)
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.models.family import setting
from hf_rope_ext.models.rope_config import RECORD, config_changes
from hf_rope_ext.models.sites import RopeSite, read_sites
from hf_rope_ext.models.temperature import softmax_changes
from hf_rope_ext.patching.arguments import TEXT_ARGUMENTS, PatchArguments
from hf_rope_ext.patching.placed_index import places_tokens
from hf_rope_ext.positions.layouts import AppliedLayout, MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions
from hf_rope_ext.rotary.axes import axis_names, read_axes
from hf_rope_ext.rotary.installed import Resolved
from hf_rope_ext.rotary.request_plan import RequestPolicy
from hf_rope_ext.rotary.rotation import Rotation
from hf_rope_ext.rotary.vision_towers import (
    AxialRotation,
    read_towers,
    tower_axes,
    tower_changes,
    with_axis_names,
)


def resolve(arguments: PatchArguments, model: nn.Module) -> Resolved:
    """Check the arguments against a model, changing nothing.

    Raises:
        RopeError: If any of them cannot be served.
    """
    arguments.check()
    if arguments.target == "vision":
        return _resolve_vision(arguments, model)
    layer_types = None if arguments.layer_types is None else tuple(arguments.layer_types)
    sites = read_sites(
        model,
        layer_types=layer_types,
        original_max_position_embeddings=arguments.original_max_position_embeddings,
    )
    for site in sites:
        _require_ready(site, arguments)
    trained = [site.geometry.original_max_position_embeddings for site in sites]
    sites = [read_axes(site) for site in sites]
    layout = arguments.mrope_layout
    if not isinstance(layout, MRopeLayout | None):
        layout = MRopeLayout(layout)
    layouts = [_apply_layout(site, layout) for site in sites]
    changed = layout if any(layouts) else None
    sites = [_assign_axes(site, applied) for site, applied in zip(sites, layouts, strict=True)]
    geometries = [site.geometry for site in sites]
    method, target = arguments.make_method(*geometries), arguments.target_length
    if arguments.limit_only:
        method, target = NoScaling(), arguments.find_limit(method, *geometries)
    policy = arguments.make_policy(method)
    if policy.compat is not None and attention_rules(method) is not None:
        raise MethodParameterError(
            f"compat={policy.compat!r} is for the length-dependent methods of stock transformers, "
            f"which has no {method.name}."
        )
    rotations = [
        _rotation(site, method, arguments.temperature, policy, applied)
        for site, applied in zip(sites, layouts, strict=True)
    ]
    axes = axis_names(sites[0].rotary, sites[0].label)
    visual = _visual(arguments.visual_positions, axes)
    # a text model on its own is given its positions, including those that belong to a layout
    implied = layout.visual_positions if layout is not None and visual is None else None
    if implied is not None and places_tokens(model, [site.config for site in sites]):
        visual = implied
    settings = {
        "target_length": target,
        "layer_types": None if layer_types is None else list(layer_types),
        **({"original_max_position_embeddings": trained} if len(set(trained)) > 1 else {}),
        **({"lengths": policy.to_dict()} if method.length_dependent else {}),
        **({} if changed is None else {"mrope_layout": asdict(changed)}),
        **({} if visual is None else {"visual_positions": visual.to_dict()}),
    }
    configs = config_changes(
        sites,
        method,
        target_length=target,
        temperature=arguments.temperature,
        settings=settings,
        has_stock_form=changed is None and visual is None and attention_rules(method) is None,
    )
    return Resolved(
        method=method,
        sites=sites,
        rotations=rotations,
        temperature=arguments.temperature,
        configs=configs,
        record=configs[0].values[RECORD],
        axes=axes,
        softmax=softmax_changes(model, sites, method, arguments.temperature),
        layout=changed,
        visual=visual,
    )


def _resolve_vision(arguments: PatchArguments, model: nn.Module) -> Resolved:
    """Resolve a patch of the vision towers."""
    for name in TEXT_ARGUMENTS:
        if getattr(arguments, name):
            raise MethodParameterError(f"{name} is for target='text', got it with 'vision'.")
    if arguments.temperature != "rotation":
        raise MethodParameterError(
            "temperature='logits' is for target='text'; a vision tower applies it to cos and sin."
        )
    trained = arguments.original_max_position_embeddings
    if isinstance(trained, list | tuple):
        raise MethodParameterError(
            f"original_max_position_embeddings is one length with target='vision', got {trained!r}."
        )
    sites = read_towers(model, trained)  # type: ignore[arg-type]
    names = tower_axes(sites[0])
    method = arguments.make_method(with_axis_names(sites[0].geometry, names))
    if attention_rules(method) is not None:
        raise MethodParameterError(
            f"{method.name} changes the attention of a text model, and target='vision' has only "
            f"frequencies to change; choose a frequency method."
        )
    if method.length_dependent:
        raise MethodParameterError(
            f"{method.name} follows the length of a request, but a vision tower sees images of all "
            f"sizes in one request; choose a static method for the largest image."
        )
    rotations = [
        AxialRotation(method, site.geometry, site.inv_freq, site.pair_order, names=names)
        for site in sites
    ]
    for site, rotation in zip(sites, rotations, strict=True):
        _require_finite(site, method, *rotation.trained_plan())
    configs = tower_changes(sites, method, {"target_length": arguments.target_length})
    return Resolved(
        method=method,
        sites=sites,
        rotations=list(rotations),
        temperature=arguments.temperature,
        configs=configs,
        record=configs[0].values[RECORD],
        axes=names,
        target="vision",
    )


def _apply_layout(site: RopeSite, layout: MRopeLayout | None) -> AppliedLayout | None:
    """Return the layout on a site, None if the site was trained with it."""
    if layout is None:
        return None
    axes = site.geometry.axes
    if axes is None:
        raise MethodParameterError(
            f"{site.path}: mrope_layout={layout.name!r} is for models whose pairs each turn by one "
            f"of several position axes (M-RoPE), as the pairs of this one do not."
        )
    applied = layout.on(axes, setting(site.config, "num_key_value_heads"))
    as_trained = AppliedLayout(tuple(map(applied.names.index, axes)), applied.names)
    return None if applied == as_trained else applied


def _assign_axes(site: RopeSite, layout: AppliedLayout | None) -> RopeSite:
    """Return the site with the axes of a layout; a layout by heads leaves the pairs' axes alone."""
    if layout is None or layout.per_head:
        return site
    axes = tuple(layout.names[row] for row in layout.rows)
    return replace(site, geometry=replace(site.geometry, axes=axes))


def _visual(rule: VisualPositions | None, axes: tuple[str, ...]) -> VisualPositions | None:
    """Check the rule for visual tokens."""
    if rule is None:
        return None
    if not isinstance(rule, VisualPositions):
        raise MethodParameterError(
            f"visual_positions must be a VisualPositions, got {rule!r}: "
            f"visual_positions=VisualPositions(factor={{'t': 4}})."
        )
    if len(axes) < 2:
        raise MethodParameterError(
            "visual_positions is for models with M-RoPE; the positions of this one have one axis."
        )
    rule.factors(axes)
    return rule


def _rotation(
    site: RopeSite,
    method: Method,
    temperature: str,
    policy: RequestPolicy,
    layout: AppliedLayout | None,
) -> Rotation:
    """Return how a site is computed; the plan is computed once here, to find errors early."""
    rotation = Rotation(
        method=method,
        geometry=site.geometry,
        trained=site.inv_freq,
        pair_order=site.pair_order,
        scales_rotation=temperature == "rotation",
        policy=policy,
        layout=layout,
    )
    frequencies, scaling = rotation.trained_plan()
    _require_finite(site, method, frequencies, scaling)
    if method.length_dependent or attention_rules(method) is not None:
        _require_per_request(site, method, temperature)
    if method.length_dependent:
        rotation.plan_for(torch.ones(1, 1, 1, dtype=torch.float64), frequencies, scaling)
    return rotation


def _require_finite(site: RopeSite, method: Method, frequencies: Tensor, scaling: float) -> None:
    if not (torch.isfinite(frequencies).all() and math.isfinite(scaling)):
        raise MethodParameterError(
            f"{site.path}: {method!r} gives frequencies that are not finite on {site.geometry!r}."
        )


def _require_per_request(site: RopeSite, method: Method, temperature: str) -> None:
    """Refuse options that a plan per request cannot have on this model."""
    reason = site.family.length_dependent
    if reason is not None:
        raise UnsupportedModelError(
            f"{method.name} on model_type={site.config.model_type!r}: {reason}. Nothing was "
            f"changed."
        )
    if not method.length_dependent:
        return
    if temperature == "logits":
        raise MethodParameterError(
            f"{method.name} with temperature='logits': a module's softmax scale cannot follow "
            f"each request; use temperature='rotation'."
        )
    geometry = site.geometry
    length = method.target_length(geometry) or geometry.original_max_position_embeddings
    longest = method.freeze(geometry, length).plan(geometry)
    if site.family.softmax_mscale and longest.softmax_scaling != 1.0:
        raise MethodParameterError(
            f"{method.name} with mscale_all_dim on model_type={site.config.model_type!r}: its "
            f"softmax scale cannot follow each request; use attention_factor."
        )


def _require_ready(site: RopeSite, arguments: PatchArguments) -> None:
    """Refuse a site that is already scaled, or whose trained length is unknown."""
    rope_type = site.rope_scaling["rope_type"]
    if rope_type != "default" and not arguments.replace:
        unused = (
            " (set after loading, so it has no effect)" if site.rope_scaling.get("edited") else ""
        )
        raise AlreadyScaledError(
            f"{site.path}: the model's own config already scales its RoPE{unused}: "
            f"{dict(site.rope_scaling)!r}. Nothing was changed; pass replace=True to start from "
            f"the unscaled rope_theta."
        )
    if site.geometry.original_max_position_embeddings < 2:
        raise MethodParameterError(
            f"{site.path}: the config does not give the trained length "
            f"({dict(site.rope_scaling)!r}); pass original_max_position_embeddings."
        )

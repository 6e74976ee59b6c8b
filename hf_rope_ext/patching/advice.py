"""Warnings to show after a successful patch."""

import math

from torch import nn

from hf_rope_ext.methods import Dynamic, Method
from hf_rope_ext.models.host import mrope_section
from hf_rope_ext.models.sites import RopeSite, window
from hf_rope_ext.models.temperature import effective_logit_factor
from hf_rope_ext.rotary.installed import Resolved


def advice(resolved: Resolved, model: nn.Module) -> list[str]:
    """Return the warnings to show after a successful patch; `describe` repeats them as notes.

    Args:
        resolved: The patch.
        model: What was patched, with everything around the transformers model.
    """
    notes = [
        f"{site.path}: the frequencies were rebuilt from the config, because {site.rebuilt}."
        for site in resolved.sites
        if site.rebuilt
    ]
    if resolved.target == "vision":
        return notes
    for config in {id(site.config): site.config for site in resolved.sites}.values():
        site = next(site for site in resolved.sites if site.config is config)
        candidates = (
            _dynamic_advice(site, resolved.method),
            _temperature_advice(site, resolved),
            _window_advice(site, resolved.method),
            _dropped_key_advice(site),
            _section_advice(site),
            _layout_advice(resolved),
            _frames_advice(site, resolved),
            site.family.advice(resolved.method, site.geometry) if site.family.advice else None,
        )
        notes += [note for note in candidates if note]
    cut = _cut_advice(resolved, model)
    return notes if cut is None else [*notes, cut]


def _temperature_advice(site: RopeSite, resolved: Resolved) -> str | None:
    target = resolved.method.target_length(site.geometry)
    longest = resolved.method.freeze(site.geometry, target) if target else resolved.method
    scaling = float(longest.plan(site.geometry).attention_scaling)
    intended, effective = scaling**2, effective_logit_factor(site, scaling)
    if resolved.temperature == "logits" or math.isclose(intended, effective):
        return None
    return (
        f"{site.path}: {resolved.method.name} is meant to multiply attention logits "
        f"by {intended:.3f}, but in model_type={site.config.model_type!r} scaling cos and sin "
        f"multiplies them by {effective:.3f}, as in stock transformers. temperature='logits' gives "
        f"the full effect."
    )


def _dynamic_advice(site: RopeSite, method: Method) -> str | None:
    if not isinstance(method, Dynamic):
        return None
    trained = site.geometry.original_max_position_embeddings
    reached = method.factor * 2 - (method.factor - 1)
    return (
        f"{site.path}: the factor of 'dynamic' is transformers' and not target over trained "
        f"length: a request of {2 * trained} positions, twice the trained length, is scaled by "
        f"{reached:g}. 'dynamic_ntk' scales by what the request needs, up to its factor."
    )


def _window_advice(site: RopeSite, method: Method) -> str | None:
    bound = window(site.config)
    target = method.target_length(site.geometry)
    if site.label is not None or bound is None or target is None or target <= bound:
        return None
    return (
        f"{site.path}: some layers have a sliding window of {bound} positions and cannot see "
        f"past it, whatever their frequencies."
    )


def _cut_advice(resolved: Resolved, model: nn.Module) -> str | None:
    """Return a warning if something around the model, such as SentenceTransformer, cuts inputs."""
    target = resolved.method.target_length(resolved.sites[0].geometry)
    for module in model.modules():
        limit = getattr(module, "max_seq_length", None)
        if isinstance(limit, int) and target is not None and limit < target:
            return (
                f"{type(module).__name__} cuts inputs to max_seq_length={limit} tokens; set "
                f"max_seq_length={target} to use the longer context."
            )
    return None


def _dropped_key_advice(site: RopeSite) -> str | None:
    if "attn_factor" not in site.rope_scaling:
        return None
    return (
        f"{site.path}: the config's attn_factor={site.rope_scaling['attn_factor']!r} is dropped, "
        f"because transformers never reads it. Pass attention_factor to set the temperature."
    )


def _section_advice(site: RopeSite) -> str | None:
    section, pairs = mrope_section(site.rotary.original, site.label), site.geometry.pairs
    if not section or sum(section) == pairs:
        return None
    return (
        f"{site.path}: mrope_section {list(section)!r} covers {sum(section)} pairs, but {pairs} "
        f"rotate; "
        f"stock code accepts this and assigns pairs to axes differently than intended. Check the "
        f"config: where the key is lost, the config class's default applies."
    )


def _layout_advice(resolved: Resolved) -> str | None:
    if resolved.layout is not None:
        other = f"mrope_layout={resolved.layout.name!r} is not the layout"
    elif resolved.visual is not None and resolved.visual.placement != "grid":
        other = f"placement={resolved.visual.placement!r} is not the placement"
    else:
        return None
    return (
        f"{other} the model was trained with: images need fine-tuning under it; text is unaffected."
    )


def _frames_advice(site: RopeSite, resolved: Resolved) -> str | None:
    visual = resolved.visual
    if visual is None or not site.family.frames_apart or "t" not in resolved.axes:
        return None
    if visual.factors(resolved.axes)[resolved.axes.index("t")] == 1.0:
        return None
    return (
        f"model_type={site.config.model_type!r} cuts videos into single frames with timestamps "
        f"between them, so the factor of 't' moves nothing; sample fewer frames, or scale the "
        f"frequencies."
    )

"""Patch a loaded model with a method, and undo it.

Only the given model and its config change: no class, no registry, no other model.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_rope_ext.attention.change import BandedAttention
from hf_rope_ext.cache.generation import cache_changes, planning_changes
from hf_rope_ext.cache.rope_deltas import note_changes
from hf_rope_ext.changes import Change, apply_all, revert_all
from hf_rope_ext.errors import (
    AlreadyScaledError,
    NotPatchedError,
    RopeWarning,
    UnsupportedModelError,
)
from hf_rope_ext.methods import Method
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.models.rope_config import enclosing_stops
from hf_rope_ext.patching.adapter_record import RecordAdapters, unrecorded
from hf_rope_ext.patching.advice import advice
from hf_rope_ext.patching.arguments import TARGETS, PatchArguments
from hf_rope_ext.patching.cache_proof import prove_cached_plans
from hf_rope_ext.patching.placed_index import placement_changes
from hf_rope_ext.patching.probe import probe_attention, probe_rotary, probe_towers
from hf_rope_ext.patching.resolve import resolve
from hf_rope_ext.positions.layouts import MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.extended_table import ExtendedTable
from hf_rope_ext.rotary.installed import Resolved, SwapRotary, find_places, patch_of
from hf_rope_ext.rotary.request_plan import RequestPlan, RequestPolicy
from hf_rope_ext.rotary.vision_towers import smallest_images

_CHANGING = threading.RLock()
"""Held while a model changes, so that threads find it patched or not, and never in between."""


def patch_model(
    model: nn.Module,
    method: str | Method | Mapping[str, str | Method],
    *,
    factor: float | Mapping[str, float] | None = None,
    target_length: int | None = None,
    original_max_position_embeddings: int | Sequence[int] | None = None,
    layer_types: Sequence[str] | None = None,
    limit_only: bool = False,
    mrope_layout: str | MRopeLayout | None = None,
    visual_positions: VisualPositions | None = None,
    temperature: str = "rotation",
    replace: bool = False,
    probe: bool = True,
    requests: RequestPolicy | None = None,
    on_growth: str | None = None,
    buckets: float | None = None,
    compat: str | None = None,
    on_plan: Callable[[RequestPlan], None] | None = None,
    target: str = "text",
    **method_knobs: Any,
) -> nn.Module:
    """Extend the context of a model in memory, in place.

    Args:
        model: A transformers model or anything around one: PEFT, quantized, dispatched, compiled,
            a vision-language model, whose text model is then meant.
        method: A name from `available_methods`, also with modifiers (``"yarn+resonance"``), or a
            method object. On a model with M-RoPE also by axis, ``{"t": "yarn", "w": "linear"}``;
            the pairs of other axes keep their frequencies.
        factor: Target length over trained length, at least 1. 1 leaves every logit bit-identical
            (except with ``dynamic``, where ``factor`` means something else). Like any knob, on a
            model with M-RoPE also by axis: ``{"t": 4, "h": 1}``.
        target_length: Target length in positions, instead of ``factor``.
        original_max_position_embeddings: The trained length in positions, where the config's
            ``max_position_embeddings`` is not it; or one for each set of frequencies, in the order
            of ``describe(model).sites`` (an encoder and its decoder can differ).
        layer_types: In families with ``rope_parameters`` per layer type, which ones to extend; by
            default those without a sliding window.
        limit_only: Only raise the length limit in the config; the frequencies stay as they are.
        mrope_layout: On a model with M-RoPE, which pairs rotate by which axis: a name or an
            `MRopeLayout`, for training and research. By default the model's own.
        visual_positions: On a model with M-RoPE, where to place the tokens of images and videos. By
            default as ``mrope_layout`` or the model does. Applies to positions that the model
            computes, not to ``position_ids`` passed in.
        temperature: Where a method's temperature goes: ``"rotation"``, into cos and sin as in
            transformers; ``"logits"``, into the attention's softmax scale, which also works where
            only part of a head rotates or queries and keys are normalised after rotation.
        replace: Whether to replace an existing patch, or a scaling in the model's own config. The
            method then starts from the unscaled geometry; factors never compound.
        probe: Whether to verify afterwards that the rotary embedding computes the plan, that the
            attention uses it, and that a length-dependent plan stays the same through a cache.
        requests: For length-dependent methods: how a request is planned, and what happens when it
            outgrows its plan; see `RequestPolicy`.
        on_growth: The same as ``requests=RequestPolicy(on_growth=...)``; so are the next three.
        buckets: See `RequestPolicy`.
        compat: See `RequestPolicy`.
        on_plan: See `RequestPolicy`.
        target: ``"text"``, or ``"vision"``: the axial rotary embeddings of the vision towers, for
            images larger than in training. Lengths then count patches along the longer side, and
            axes are ``"h"`` and ``"w"``. The two targets are patched and undone independently.
        **method_knobs: The method's other knobs.

    Returns:
        ``model``.

    Raises:
        RopeError: One of its subclasses; the model is then unchanged.
    """
    options = {  # the keyword arguments as they were passed; nothing else is local yet
        name: value
        for name, value in locals().items()
        if name not in ("model", "method", "probe", "method_knobs")
    }
    arguments = PatchArguments.from_keywords(method, **options, **method_knobs)
    with _CHANGING:
        return _patch(model, arguments, probe=probe)


def _patch(model: nn.Module, arguments: PatchArguments, *, probe: bool) -> nn.Module:
    target = arguments.target
    previous = patch_of(model, target)
    if previous is not None and not arguments.replace:
        part = "model is" if target == "text" else f"model's {target} is"
        raise AlreadyScaledError(
            f"the {part} already patched with {previous.method!r}; nothing was changed. "
            f"Call unpatch_model first, or pass replace=True."
        )
    with _set_aside(previous):
        resolved = resolve(arguments, model)
        _require_loaded(resolved)
        resolved.changes.extend(_changes(model, resolved))
        apply_all(resolved.changes)
        try:
            if probe:
                _probe(model, resolved)
            for note in (*advice(resolved, model), *unrecorded(model)):
                warnings.warn(note, RopeWarning, stacklevel=3)
        except BaseException:
            revert_all(resolved.changes)
            raise
    return model


def unpatch_model(model: nn.Module, target: str | None = None) -> nn.Module:
    """Undo `patch_model`: modules, buffers and config return to what they were, bit for bit.

    Args:
        model: The model.
        target: ``"text"`` or ``"vision"``; by default whichever is patched.

    Returns:
        ``model``.

    Raises:
        NotPatchedError: If it is not patched.
    """
    targets = TARGETS if target is None else (target,)
    with _CHANGING:
        patches = [patch for one in targets if (patch := patch_of(model, one)) is not None]
        if not patches:
            part = "" if target is None else f" in its {target} model"
            raise NotPatchedError(
                f"{type(model).__name__} is not patched{part}; nothing was changed."
            )
        revert_all([change for patch in patches for change in patch.changes])
    return model


@contextmanager
def patched(
    model: nn.Module, method: str | Method | Mapping[str, str | Method], **arguments: Any
) -> Iterator[nn.Module]:
    """Patch a model for the duration of a ``with`` block; arguments are those of `patch_model`.

    Afterwards the model has the patch it had before, if any, whatever was done to it in the block.
    """
    target = arguments.get("target", "text")
    with _CHANGING:
        before = patch_of(model, target)
        patch_model(model, method, **arguments)
    try:
        yield model
    finally:
        with _CHANGING:
            after = patch_of(model, target)
            if after is not before:  # also where the block itself patched or unpatched
                if after is not None:
                    revert_all(after.changes)
                if before is not None:
                    apply_all(before.changes)


# methods import torch alone, so what calling one does is put in from here
Method.patched = staticmethod(patched)


def _require_loaded(resolved: Resolved) -> None:
    for site in resolved.sites:
        if site.rotary.live(site.label).is_meta:
            raise UnsupportedModelError(
                f"{site.path} is on the meta device, so there are no frequencies yet; load the "
                f"weights first. Nothing was changed."
            )


def _changes(model: nn.Module, resolved: Resolved) -> list[Change]:
    """Return every change that a patch makes, in the order in which they are applied."""
    swaps: dict[str, SwapRotary] = {}
    for site in resolved.sites:
        rotary = site.rotary
        if rotary.path in swaps:
            continue
        rotations = {
            other.label: rotation
            for other, rotation in zip(resolved.sites, resolved.rotations, strict=True)
            if other.rotary.path == rotary.path
        }
        build = ExtendedTable if rotary.family.table else ExtendedRotary
        module = build(
            rotary.original,
            rotations,
            resolved,
            path=rotary.path,
            reads_config=rotary.family.reads_config,
        )
        swaps[rotary.path] = SwapRotary(module, find_places(model, rotary.original))
    changes: list[Change] = [*swaps.values(), *resolved.softmax]
    if resolved.target == "text":
        if resolved.rotations[0].policy.compat is None:
            changes += cache_changes(model, list(swaps.values()))
            if resolved.method.length_dependent or attention_rules(resolved.method):
                changes += planning_changes(model, list(swaps.values()))
        changes += note_changes(model, list(swaps.values()))
    if resolved.visual is not None:
        configs = [site.config for site in resolved.sites]
        changes += placement_changes(model, configs, resolved.visual, resolved.axes)
    around = [part.config for chain in innermost_models(model, swaps) for part in chain]
    stops = enclosing_stops(resolved.configs, around)
    return [*changes, *resolved.configs, *stops, RecordAdapters(model)]


def _probe(model: nn.Module, resolved: Resolved) -> None:
    """Prove that the patch took effect."""
    rotaries = resolved.rotaries
    if resolved.target == "vision":
        probe_towers(resolved.sites, rotaries)
        probe_attention(model, rotaries, smallest_images)
    else:
        probe_rotary(rotaries)
        probe_attention(model, rotaries)
        for change in resolved.changes:
            if isinstance(change, BandedAttention):
                change.prove()
        policy = resolved.rotations[0].policy
        if resolved.method.length_dependent and policy.compat is None:
            prove_cached_plans(model, rotaries)


@contextmanager
def _set_aside(patch: Resolved | None) -> Iterator[None]:
    """Revert a patch; on an error in the ``with`` block, apply it again."""
    if patch is not None:
        revert_all(patch.changes)
    try:
        yield
    except BaseException:
        if patch is not None:
            apply_all(patch.changes)
        raise

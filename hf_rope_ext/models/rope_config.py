"""Translate a patch into ``config.rope_parameters``, so that other tools load it.

A method that transformers knows is saved under its ``rope_type``, and any other static method as
``longrope``, whose lists divide the trained frequencies pair by pair. A method that has neither
form is saved so that stock tools stop instead of running an unscaled model, with an error that says
what to load it with.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hf_rope_ext.changes import SetAttributes
from hf_rope_ext.errors import ExportError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods import Method, method_record
from hf_rope_ext.models.family import Config, setting
from hf_rope_ext.models.sites import RopeSite

RECORD = "hf_rope_ext"
"""Name of the config attribute that holds the exact record of a patch."""

STOP = "experts_implementation"
"""A config entry at which stock transformers stops building a model if it does not know the value.

It checks this one for every model type, with experts or without, whether weights are loaded or not.
Many families read no ``rope_type`` or accept few, so the type alone would stop some of them only.
Other engines ignore this entry and stop at the type.
"""

SCALING_KEYS = frozenset(
    {
        "alpha",
        "attention_factor",
        "attn_factor",
        "beta_fast",
        "beta_slow",
        "edited",
        "factor",
        "high_freq_factor",
        "long_factor",
        "long_mscale",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "short_factor",
        "short_mscale",
        "truncate",
        "type",
    }
)
"""Keys of ``rope_parameters`` that describe the scaling; the others describe the training."""

REST = 1e30
"""The slowdown that stands for frequency 0."""


def config_changes(
    sites: Sequence[RopeSite],
    method: Method,
    *,
    target_length: int | None,
    temperature: str,
    settings: Mapping[str, Any],
    has_stock_form: bool = True,
) -> list[SetAttributes]:
    """Return the config changes of a patched model.

    Args:
        sites: The sites that the method extends.
        method: The method that extends them.
        target_length: The target length asked for; None for the method's own.
        temperature: ``"rotation"`` or ``"logits"``.
        settings: Further entries of the record.
        has_stock_form: Whether stock code turns the same pairs at the same positions.
    """
    changes = []
    for config in {id(site.config): site.config for site in sites}.values():
        own = [site for site in sites if site.config is config]
        geometry = own[0].geometry
        attributes, unscaled = {}, {}
        before = setting(config, "max_position_embeddings")
        length = target_length or method.target_length(geometry)
        if before is not None and not own[0].family.sized_by_length:
            attributes["max_position_embeddings"] = length or before
            unscaled["max_position_embeddings"] = before
        try:
            if not has_stock_form:
                raise ExportError("stock code rotates other pairs, or at other positions.")
            attributes |= stock_attributes(own, method, temperature, attributes)
        except ExportError:
            attributes |= loud_attributes(own, method, attributes)
        if setting(config, "rope_parameters"):
            unscaled["rope_parameters"] = _nested(
                own, {site.label: unscaled_parameters(site) for site in own}
            )
        attributes[RECORD] = {
            "version": 1,
            "method": method_record(method),
            "original_max_position_embeddings": geometry.original_max_position_embeddings,
            "temperature": temperature,
            **settings,
            "unscaled": unscaled,
        }
        changes.append(SetAttributes(config, attributes))
    return changes


def enclosing_stops(
    changes: Sequence[SetAttributes], around: Sequence[Config]
) -> list[SetAttributes]:
    """Return the changes that make stock code stop at the configs around patched ones.

    A whole config hands its own entry down to the configs inside it, over theirs.

    Args:
        changes: The changes of the patched configs.
        around: The configs of the models around those, and of the patched models themselves.
    """
    stop = next((change.values[STOP] for change in changes if STOP in change.values), None)
    return [] if stop is None else [SetAttributes(config, {STOP: stop}) for config in around]


def loud_attributes(
    sites: Sequence[RopeSite], method: Method, beside: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config attributes at which stock code stops, where it cannot compute a method.

    Args:
        sites: All patched sites of a config.
        method: The method that extends them.
        beside: Other new attributes of the config.
    """
    attributes: dict[str, Any] = {STOP: remedy(method)}
    if not setting(sites[0].config, "rope_parameters"):
        return attributes
    unscaled = {site.label: unscaled_parameters(site) for site in sites}
    loud = {label: {**own, "rope_type": remedy(method)} for label, own in unscaled.items()}
    named = {"rope_parameters": _nested(sites, loud)}
    if _reads(sites[0].config, {**beside, **named}):
        return {**attributes, **named}
    return {**attributes, "rope_parameters": _nested(sites, unscaled)}


def remedy(method: Method) -> str:
    """Return the value of a config entry that stock code refuses; the refusal quotes it."""
    name = method_record(method)["name"]
    return f"{RECORD}.{name}: load this model with {RECORD}.load_pretrained"


def stock_attributes(
    sites: Sequence[RopeSite],
    method: Method,
    temperature: str,
    beside: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the config attributes that make stock transformers equivalent to the patch.

    Args:
        sites: All patched sites of a config.
        method: The method that extends them.
        temperature: ``"rotation"`` or ``"logits"``.
        beside: Other new attributes of the config.

    Returns:
        ``rope_parameters``, and what stock code reads alongside them.

    Raises:
        ExportError: If there are none.
    """
    config = sites[0].config
    if not setting(config, "rope_parameters"):
        raise ExportError(
            f"the config of model_type={config.model_type!r} has no rope_parameters; load the "
            f"model with hf_rope_ext.load_pretrained."
        )
    choices: dict[str | None, list[dict[str, Any]]] = {}
    for site in sites:
        forms = _choices(site, method, temperature)
        choices[site.label] = [form for form in choices.get(site.label, forms) if form in forms]
    parameters: dict[str | None, dict[str, Any]] = {}
    for label, forms in choices.items():
        for form in forms:
            parameters[label] = form
            attributes = {"rope_parameters": _nested(sites, parameters)}
            attributes |= _needed_beside(sites[0], parameters)
            if _reads(config, {**beside, **attributes}):
                break
        else:
            raise ExportError(
                f"{method.name} has no form in transformers' config for model_type="
                f"{config.model_type!r}. Load it with hf_rope_ext.load_pretrained."
            )
    return attributes


def _choices(site: RopeSite, method: Method, temperature: str) -> list[dict[str, Any]]:
    """Return the equivalent forms of ``rope_parameters``, the preferred one first.

    Raises:
        ExportError: If the method is length-dependent without such a form, or no key holds its
            temperature.
    """
    carried = unscaled_parameters(site)
    geometry, plan = site.geometry, method.plan(site.geometry)
    if temperature == "logits" and plan.attention_scaling != 1.0 and not _reaches_logits(site):
        raise ExportError(
            f"{method.name} with temperature='logits': transformers has no key for it, and in "
            f"model_type={site.config.model_type!r} attention_factor has another effect."
        )
    native = method.rope_parameters(geometry)
    forms = [native] if native is not None else []
    if not method.length_dependent:
        forms.append(longrope_parameters(geometry, plan, method.target_length(geometry)))
    elif not forms:
        raise ExportError(
            f"{method.name} has no form in transformers' config: its frequencies follow the "
            f"length of the request. Export the plan of one length with frozen=LENGTH."
        )
    if geometry.rotated_pairs is not None:
        forms[-1]["partial_rotary_factor"] = 1.0  # the lists cover unrotated pairs too
        if native is not None and native["rope_type"] == "linear":
            forms.append({"rope_type": "proportional", "factor": native["factor"]})
    if site.family.reads_config:
        forms[-1] |= {"short_mscale": plan.attention_scaling, "long_mscale": plan.attention_scaling}
    return [_carry(carried, form) for form in forms if _computes(site, form)]


def longrope_parameters(
    geometry: RopeGeometry, plan: FrequencyPlan, target_length: int | None
) -> dict[str, Any]:
    """Express any static plan as transformers' ``longrope`` type.

    Both lists are the trained frequencies divided by the plan's, so it applies at every length.
    """
    spaced = geometry.base ** -geometry.exponents()
    slowdown = [
        # rounded to 14 digits, so that equal slowdowns at different bases compare equal
        float(f"{trained / planned:.14g}") if planned > 0 else REST
        for trained, planned in zip(spaced, plan.inv_freq, strict=True)
    ]
    trained_length = geometry.original_max_position_embeddings
    return {
        "rope_type": "longrope",
        "factor": max((target_length or 0) / trained_length, 1.0),
        "original_max_position_embeddings": trained_length,
        "short_factor": slowdown,
        "long_factor": slowdown,
        "attention_factor": float(plan.attention_scaling),
    }


def unscaled_parameters(site: RopeSite) -> dict[str, Any]:
    """Return a site's ``rope_parameters`` without scaling, family-specific keys included."""
    found = site.rope_scaling
    kept = {
        key: value
        for key, value in found.items()
        if key not in SCALING_KEYS or key in site.family.keeps
    }
    kept["rope_theta"] = site.geometry.base
    if site.family.fixed_theta:
        kept["rope_theta"] = site.config.rope_parameters["rope_theta"]
    if site.geometry.rotated_pairs is not None:
        return {**kept, "rope_type": "proportional"}
    if "default" in (site.stock_types or ("default",)):
        return {**kept, "rope_type": "default"}
    return {**kept, "rope_type": "linear", "factor": 1.0}


def _carry(carried: Mapping[str, Any], native: Mapping[str, Any]) -> dict[str, Any]:
    if native == {"rope_type": "default"}:
        return dict(carried)  # unscaled, so p-RoPE too keeps its type
    return {**carried, **native}


def _computes(site: RopeSite, form: Mapping[str, Any]) -> bool:
    """Return whether the family's stock code computes what ``form`` means."""
    rope_type = form["rope_type"]
    if form == {"rope_type": "default"}:
        return True
    if site.stock_types is not None and rope_type not in site.stock_types:
        return False
    if "rope_theta" in form and site.family.fixed_theta:
        return False
    if site.label is not None and form.get("truncate", True) is False:
        return False  # transformers reads the key from the outer dict only
    # the other types assume that every pair rotates
    return site.geometry.rotated_pairs is None or rope_type in ("longrope", "proportional")


def _reads(config: Config, attributes: Mapping[str, Any]) -> bool:
    """Return whether transformers accepts a config with these attributes."""
    settings = {**config.to_dict(), **copy.deepcopy(dict(attributes))}
    settings.pop(RECORD, None)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        type(config).from_dict(settings)
    except Exception:  # validators raise various types
        return False
    finally:
        logger.setLevel(level)
    return True


def _reaches_logits(site: RopeSite) -> bool:
    """Return whether the scaling of cos and sin carries over to the logits in full."""
    full = site.geometry.head_dim in (None, site.geometry.rotary_dim)
    return full and not site.family.norm_after_rope


def _nested(
    sites: Sequence[RopeSite], parameters: Mapping[str | None, dict[str, Any]]
) -> dict[str, Any]:
    """Return the ``rope_parameters`` of a config, with those of the given labels replaced."""
    if None in parameters:
        return parameters[None]
    return {**sites[0].config.rope_parameters, **parameters}


def _needed_beside(
    site: RopeSite, parameters: Mapping[str | None, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the config attributes that stock code reads alongside ``rope_parameters``."""
    attributes: dict[str, Any] = {}
    if all(form["rope_type"] == "default" for form in parameters.values()):
        return attributes
    if setting(site.config, "head_dim", 0) is None:
        # some types do not derive it from the hidden size
        attributes["head_dim"] = site.geometry.head_dim
    if hasattr(site.config, "original_max_position_embeddings"):
        # if present, stock code prefers it to the one in rope_parameters
        attributes["original_max_position_embeddings"] = (
            site.geometry.original_max_position_embeddings
        )
    return attributes

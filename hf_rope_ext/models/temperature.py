"""Where a method's temperature is applied, and its effect on attention logits."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_rope_ext.changes import SetAttributes
from hf_rope_ext.errors import UnsupportedModelError
from hf_rope_ext.geometry import FrequencyPlan
from hf_rope_ext.methods import Method
from hf_rope_ext.models.find import owned_modules
from hf_rope_ext.models.sites import RopeSite


def effective_logit_factor(site: RopeSite, attention_scaling: float) -> float:
    """Return the mean effect of ``attention_scaling`` on the logits.

    If the whole head rotates, it is ``attention_scaling ** 2``. If part of it does, the rest of the
    logit is unscaled (all dimensions are assumed to contribute equally); if queries and keys are
    normalised after rotation, the scaling cancels out.
    """
    if site.family.norm_after_rope:
        return 1.0
    head_dim = site.geometry.head_dim or site.geometry.rotary_dim
    share = min(site.geometry.rotary_dim / head_dim, 1.0)
    return share * attention_scaling**2 + 1.0 - share


def softmax_changes(
    model: nn.Module, sites: list[RopeSite], method: Method, temperature: str
) -> list[SetAttributes]:
    """Return the softmax scales that a method changes.

    Two things do: ``temperature="logits"``, and ``mscale_all_dim`` in the families whose stock
    attention reads it when it is built.

    Raises:
        UnsupportedModelError: If a temperature for the logits has nowhere to go.
    """
    plans = {(id(site.config), site.label): method.plan(site.geometry) for site in sites}
    changes = []
    for module, config in _attentions(model, sites):
        plan = plans.get((id(config), None)) or plans.get((id(config), _label(module, config)))
        if plan is not None:
            after = _softmax_scale(module, sites[0], plan, temperature)
            if after != module.scaling:
                changes.append(SetAttributes(module, {"scaling": after}))
    wanted = any(plan.attention_scaling != 1.0 for plan in plans.values())
    if temperature == "logits" and wanted and not changes:
        raise UnsupportedModelError(
            f"temperature='logits': no attention module of model_type="
            f"{sites[0].config.model_type!r} has a softmax scale to change; nothing was changed. "
            f"Use temperature='rotation'."
        )
    return changes


def _attentions(model: nn.Module, sites: list[RopeSite]) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the attention modules that rotate, with the config of their tower."""
    configs = {id(site.config) for site in sites}
    for _, module, config in owned_modules(model):
        if (
            id(config) in configs
            and "Attention" in type(module).__name__
            and isinstance(getattr(module, "scaling", None), float)
            and getattr(module, "use_rope", True)
        ):
            yield module, config


def _label(module: nn.Module, config: Any) -> Any:
    """Return the layer type of an attention module."""
    index = getattr(module, "layer_idx", None)
    labels = getattr(config, "layer_types", None)
    label = getattr(module, "rope_layer_type", None) or getattr(module, "layer_type", None)
    return label or (labels[index] if labels and isinstance(index, int) else None)


def _softmax_scale(
    module: nn.Module, site: RopeSite, plan: FrequencyPlan, temperature: str
) -> float:
    scale = float(module.scaling)  # type: ignore[arg-type]
    if site.family.softmax_mscale and hasattr(module, "qk_head_dim"):
        scale = float(module.qk_head_dim) ** -0.5 * plan.softmax_scaling  # type: ignore[arg-type]
    if temperature == "logits":
        scale *= float(plan.attention_scaling) ** 2
    return scale

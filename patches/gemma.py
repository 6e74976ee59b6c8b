"""Gemma 4's draft models, whose queries attend to keys of the target model."""

from typing import Any

from torch import nn

from hf_rope_ext.models.family import Family


def keys_of_target(model: nn.Module) -> dict[str, Any]:
    """Return a position to draft from, and the keys and values of two positions of the target."""
    config: Any = model.config
    layers = config.get_text_config().per_layer_config
    weights = next(model.parameters())
    shared = {}
    for label in ("full_attention", "sliding_attention"):
        shape = (1, layers[label].num_key_value_heads, 2, layers[label].head_dim)
        shared[label] = (weights.new_zeros(shape), weights.new_zeros(shape))
    return {
        "inputs_embeds": weights.new_zeros(1, 1, 2 * config.backbone_hidden_size),
        "shared_kv_states": shared,
    }


FAMILIES = (
    Family(
        model_types=("gemma4_assistant", "gemma4_unified_assistant"),
        length_dependent=(
            "its queries attend to keys that the target model rotated, in a call with other "
            "positions of the request"
        ),
        probe=keys_of_target,
    ),
)

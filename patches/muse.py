"""Muse's draft model, which runs on hidden states of the target model."""

from typing import Any

from torch import nn

from hf_rope_ext.models.family import Family


def hidden_states(model: nn.Module) -> dict[str, Any]:
    """Return two positions of context, and two to draft."""
    config: Any = model.config
    weights = next(model.parameters())
    width = config.hidden_size * len(config.target_layer_ids)
    return {
        "context_hidden_states": weights.new_zeros(1, 2, width),
        "noise_embeds": weights.new_zeros(1, 2, config.hidden_size),
    }


FAMILIES = (
    Family(
        model_types=("muse_glimmer_assistant",),
        length_dependent=(
            "it drafts from hidden states of the target model, in calls that do not show all "
            "positions of the request"
        ),
        probe=hidden_states,
    ),
)

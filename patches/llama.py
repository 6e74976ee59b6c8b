"""Llama 4 and other families that normalise queries and keys after rotation."""

from typing import Any

import torch
from torch import nn

from hf_rope_ext.models.family import Family


def with_image(model: nn.Module) -> dict[str, Any]:
    """Return two tokens that attend to an encoded image, which IDEFICS requires."""
    config: Any = model.config
    weights = next(model.parameters())
    tokens = torch.tensor([[1, 2]], device=weights.device)
    return {
        "input_ids": tokens,
        "image_encoder_embeddings": weights.new_zeros(1, 1, 2, config.vision_config.embed_dim),
        "image_attention_mask": torch.ones_like(tokens)[..., None],
        "use_cache": False,
    }


FAMILIES = (
    Family(model_types=("idefics",), norm_after_rope=True, probe=with_image),
    Family(model_types=("llama4_text", "nanochat"), norm_after_rope=True),
)

"""Speech models: several tokens per position, or audio input."""

from typing import Any

import torch
from torch import nn

from hf_rope_ext.models.family import Family


def codebooks(model: nn.Module) -> dict[str, Any]:
    """Return two positions, each with a token from every codebook and a text token."""
    config: Any = model.config
    device = next(model.parameters()).device
    tokens = torch.ones(1, 2, config.num_codebooks + 1, dtype=torch.int64, device=device)
    return {"input_ids": tokens, "use_cache": False}


FAMILIES = (
    Family(model_types=("voxtral_realtime",), cacheless="it runs on audio alone"),
    Family(model_types=("moonshine_streaming",), sized_by_length=True),
    Family(model_types=("kyutai_speech_to_text",), probe=codebooks),
    Family(
        model_types=("clvp", "clvp_encoder"),
        refused="its rotary embedding is given no positions, only the shape of its input",
    ),
)

"""Vision towers whose axes differ from row and column, or with another order of pairs."""

from hf_rope_ext.models.family import Config, Family


def _even_then_odd(config: Config) -> list[int]:
    """Return Pixtral's order: rows and columns take the head's frequencies in turn."""
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    return [*range(0, width // 2, 2), *range(1, width // 2, 2)]


FAMILIES = (
    Family(model_types=("gemma4_vision",), axes=("w", "h")),
    Family(model_types=("minimax_m3_vl_vision",), axes=("t", "h", "w")),
    Family(model_types=("pixtral",), pair_order=_even_then_odd),
)

"""Vision towers whose axes differ from row and column."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(model_types=("gemma4_vision",), axes=("w", "h")),
    Family(model_types=("minimax_m3_vl_vision",), axes=("t", "h", "w")),
)

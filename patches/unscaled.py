"""Families whose config accepts no scaling."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(model_types=("cosmos3_edge_text",), stock_types=("default",), frames_apart=True),
    Family(model_types=("recurrent_gemma",), stock_types=("default",)),
)

"""Families that take no scaling in their config."""

from hf_rope_ext.families import Family

FAMILIES = (Family(model_types=("cosmos3_edge_text", "recurrent_gemma"), stock_types=("default",)),)

"""Granite and Molmo, whose layers do not all share a rotary embedding."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(model_types=("granite_swa", "granitemoe_swa"), fixed_theta=True),
    Family(model_types=("molmo2_text",), unscaled=("rotary_emb_unscaled",), fixed_theta=True),
)

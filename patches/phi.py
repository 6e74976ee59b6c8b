"""Phi, whose config accepts LongRoPE only; PhiMoE recomputes its frequencies in every forward."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(model_types=("phi3", "phi4_multimodal"), stock_types=("default", "longrope")),
    Family(model_types=("phimoe",), reads_config=True, stock_types=("default", "longrope")),
)

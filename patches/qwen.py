"""Qwen, with the advice its model cards give on extension."""

from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Method
from hf_rope_ext.models.family import Family

QWEN3_MAX_POSITION_EMBEDDINGS = 40960


def native_length(method: Method, geometry: RopeGeometry) -> str | None:
    """Warn that Qwen3's config includes room for the answer in its length."""
    trained = geometry.original_max_position_embeddings
    if _stretch(method, geometry) == 1.0 or trained != QWEN3_MAX_POSITION_EMBEDDINGS:
        return None
    return (
        f"the trained length is taken to be {trained}, the config's max_position_embeddings; "
        f"Qwen3's model card gives 32768. Pass original_max_position_embeddings=32768 to scale "
        f"from that."
    )


def localisation(method: Method, geometry: RopeGeometry) -> str | None:
    """Warn that Qwen2.5-VL's model card advises against YaRN."""
    if _stretch(method, geometry) == 1.0:
        return None
    return (
        "Qwen2.5-VL's model card advises against YaRN, which harms temporal and spatial "
        "localisation; for long videos it only raises the length limit, since positions grow more "
        "slowly than tokens: pass limit_only=True for that."
    )


def slow_positions(method: Method, geometry: RopeGeometry) -> str | None:
    """Warn that Qwen3-VL's model card uses a factor below the ratio of token counts."""
    if _stretch(method, geometry) < 4.0:
        return None
    return (
        "Qwen3-VL's model card uses a factor of 2 or 3 where token counts suggest 4, since "
        "M-RoPE positions grow more slowly than tokens."
    )


def _stretch(method: Method, geometry: RopeGeometry) -> float:
    trained = geometry.original_max_position_embeddings
    return (method.target_length(geometry) or trained) / trained


FAMILIES = (
    Family(model_types=("qwen3", "qwen3_moe"), advice=native_length),
    Family(model_types=("qwen2_5_vl_text",), advice=localisation),
    Family(model_types=("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), next_text="max"),
    Family(
        model_types=("qwen3_vl_moe_text", "qwen3_vl_text"),
        frames_apart=True,
        advice=slow_positions,
    ),
    Family(
        model_types=("qwen3_5_moe_text", "qwen3_5_text", "qwen4_exp_text"),
        frames_apart=True,
    ),
)

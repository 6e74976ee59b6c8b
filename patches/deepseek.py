"""Families with DeepSeek's multi-head latent attention."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(
        model_types=(
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "hy_v4",
            "hy_v4_vl_text",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ),
        softmax_mscale=True,
    ),
    Family(
        model_types=("deepseek_v4",),
        # used only by layers with a sliding window
        windowed=("main",),
        length_dependent=(
            "queries and keys are rotated in separate calls, which see different positions of one "
            "request"
        ),
    ),
)

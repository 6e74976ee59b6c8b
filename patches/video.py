"""Families that give a video's frames to the model one by one, each after its time as text."""

from hf_rope_ext.families import Family

FAMILIES = (
    Family(
        model_types=(
            "cohere_compass",
            "cosmos3_edge",
            "cosmos3_omni",
            "glm46v",
            "glm4v",
            "glm4v_moe",
            "glm_ocr",
            "glmga",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_vl",
            "qwen3_vl_moe",
            "qwen4_exp",
        ),
        frames_apart=True,
    ),
)

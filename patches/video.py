"""Families that give a video's frames to the model one by one, each after its time as text."""

from hf_rope_ext.families import Family

FAMILIES = (
    Family(
        model_types=(
            "cohere_compass",
            "cohere_compass_text",
            "cosmos3_edge",
            "cosmos3_omni",
            "glm46v",
            "glm4v",
            "glm4v_moe",
            "glm4v_moe_text",
            "glm4v_text",
            "glm_ocr",
            "glm_ocr_text",
            "glmga",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_vl",
            "qwen3_vl_moe",
            "qwen4_exp",
            "qwen4_exp_text",
        ),
        frames_apart=True,
    ),
)

"""Vision-language models: their position axes, and placement of images and videos."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(
        model_types=("cohere_compass_text", "glm4v_moe_text", "glm4v_text", "glm_ocr_text"),
        frames_apart=True,
    ),
    # of HY V4 VL, each frame of a video starts behind the one before on all axes
    Family(model_types=("glm_image", "hy_v4_vl", "minicpmv4_7"), next_text=None),
    # rows and columns of a page, without time
    Family(model_types=("neomme",), axes=("h", "w")),
)

"""Hunyuan, which normalises queries and keys after rotation."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(model_types=("hunyuan_v1_dense", "hunyuan_v1_moe"), norm_after_rope=True),
    Family(
        model_types=("hunyuan_vl", "hunyuan_vl_text"),
        norm_after_rope=True,
        # running position, column, row, and index of the image
        axes=("position", "w", "h", "image"),
        next_text="tokens",
        row_ends=True,
    ),
)

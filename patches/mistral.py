"""Recent Mistral models, which read their scaling in every forward pass."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(
        model_types=("ministral3",),
        keeps=("original_max_position_embeddings",),
    ),
    Family(
        model_types=("mistral4",),
        softmax_mscale=True,
        # its default type rotates more pairs than the trained model does
        stock_types=("dynamic", "linear", "llama3", "longrope", "yarn"),
        keeps=("original_max_position_embeddings",),
    ),
    Family(
        model_types=("mistral_large4_text",),
        softmax_mscale=True,
    ),
)

"""Composite models with several text towers."""

from hf_rope_ext.models.family import Family

KEYS_OF_ANOTHER_TOWER = (
    "queries of one tower attend to keys that another tower rotated, in a call with other "
    "positions of the request"
)

FAMILIES = (
    Family(
        model_types=("blt",),
        text_configs=("encoder_config", "global_config", "decoder_config", "patcher_config"),
        cacheless="stock transformers cannot make its cache: its config counts no layers",
    ),
    Family(model_types=("dia",), text_configs=("encoder_config", "decoder_config")),
    Family(model_types=("t5gemma",), text_configs=("encoder", "decoder")),
    Family(model_types=("t5gemma2",), text_configs=("encoder.text_config", "decoder")),
    Family(
        model_types=("pi0",),
        text_configs=("vlm_config.text_config", "dit_config"),
        length_dependent=KEYS_OF_ANOTHER_TOWER,
    ),
    Family(model_types=("diffusion_gemma",), length_dependent=KEYS_OF_ANOTHER_TOWER),
)

"""Families that keep a table of sines and cosines."""

from hf_rope_ext.models.family import Family

FAMILIES = (
    Family(model_types=("codegen", "gptj"), table="embed_positions", base=10000.0),
    Family(model_types=("roformer",), table="embed_positions", base=10000.0, sized_by_length=True),
)

"""NeoMME: rows and columns take turns, and there is no time."""

from hf_rope_ext.families import Family

FAMILIES = (Family(model_types=("neomme",), axes=("h", "w")),)

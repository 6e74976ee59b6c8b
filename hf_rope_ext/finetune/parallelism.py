"""Restrictions on runs whose launcher splits sequences over several devices."""

import os

from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.recipe import Recipe
from hf_rope_ext.rotary.installed import patch_of

SPLIT = "the launcher splits sequences over several devices (context or sequence parallelism)"


def require_whole_sequences(recipe: Recipe) -> None:
    """Refuse techniques that need whole sequences on each device, where sequences are split.

    Raises:
        RopeError: If the recipe uses one.
    """
    for name in ("pose_length", "shifted_groups", "mixed_windows"):
        if getattr(recipe, name) is not None and _splits_sequences():
            raise RopeError(
                f"{name} needs whole sequences on each device, but {SPLIT}; use one or the other."
            )


def require_static_plan(model: nn.Module) -> None:
    """Refuse a length-dependent method where sequences are split: no device knows their length.

    Raises:
        RopeError: If the model is patched with one.
    """
    patch = patch_of(model)
    if patch is not None and patch.method.length_dependent and _splits_sequences():
        raise RopeError(
            f"the plan of {patch.method.name!r} depends on the length of a sequence, but "
            f"{SPLIT}; use a static method, such as yarn."
        )


def _splits_sequences() -> bool:
    sizes = (os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("CP", "SP"))
    return any(size != "1" for size in sizes)

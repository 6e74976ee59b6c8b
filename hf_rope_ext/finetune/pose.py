"""PoSE: train on short sequences whose positions skip, so that the model sees long distances.

Positions are shifted inside the rotary embedding. In ``position_ids``, transformers would take a
skip for the border of a packed document and mask the attention across it, which is exactly the
attention that PoSE trains.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.extended_table import ExtendedTable
from hf_rope_ext.rotary.installed import patch_of


class PositionSkips:
    """Per-token offsets to the positions that a patched model's rotary embeddings see.

    Masks, caches and everything else still see the unshifted positions.
    """

    def __init__(self) -> None:
        self.offsets: Tensor | None = None

    def set(self, offsets: Tensor | None) -> None:
        """Set the offsets of the next forward pass, ``(batch, seq)``, or None."""
        self.offsets = offsets

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Shift the positions in a rotary embedding's arguments."""
        if self.offsets is None:
            return args, kwargs
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _shift(kwargs["position_ids"], self.offsets)}
        x, positions, *rest = args
        return (x, _shift(positions, self.offsets), *rest), kwargs


@contextmanager
def position_skips(model: nn.Module) -> Iterator[PositionSkips]:
    """Allow position offsets inside a patched model's rotary embeddings for a ``with`` block.

    Args:
        model: A patched model.

    Yields:
        The object that takes the offsets.

    Raises:
        RopeError: If the model is not patched, or looks its angles up in a table.
    """
    patch = patch_of(model)
    rotaries = [
        module
        for module in model.modules()
        if isinstance(module, ExtendedRotary) and module.patch is patch
    ]
    if not rotaries or any(isinstance(module, ExtendedTable) for module in rotaries):
        raise RopeError(
            "skip-wise positions need a model patched by patch_model, of a family that computes "
            "its angles from positions."
        )
    skips = PositionSkips()
    hooks = [module.register_forward_pre_hook(skips, with_kwargs=True) for module in rotaries]
    try:
        yield skips
    finally:
        for hook in hooks:
            hook.remove()


def _shift(positions: Tensor, offsets: Tensor) -> Tensor:
    if positions.shape[-1] != offsets.shape[-1]:
        raise RopeError(
            f"position offsets are for {offsets.shape[-1]} tokens, but the forward pass has "
            f"{positions.shape[-1]}."
        )
    return positions + offsets.to(positions.device)

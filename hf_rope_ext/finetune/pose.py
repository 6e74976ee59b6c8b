"""PoSE: train on short sequences whose positions skip, so that far distances are seen.

Positions are moved inside the rotary embedding. Handed to the model as ``position_ids``, a jump
reads as the border of a packed document to transformers, which then masks the attention across it:
exactly the attention that PoSE means to train.
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
    """Adds an offset per token to the positions that a patched model's rotary embeddings see.

    Masks, caches and everything else still see the true positions.
    """

    def __init__(self) -> None:
        self.offsets: Tensor | None = None

    def set(self, offsets: Tensor | None) -> None:
        """Set what the next forward adds, ``(batch, seq)``; None for nothing."""
        self.offsets = offsets

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the positions in a rotary embedding's arguments."""
        if self.offsets is None:
            return args, kwargs
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._moved(kwargs["position_ids"])}
        x, positions, *rest = args
        return (x, self._moved(positions), *rest), kwargs

    def _moved(self, positions: Tensor) -> Tensor:
        if self.offsets is None or positions.shape[-1] != self.offsets.shape[-1]:
            raise RopeError(
                f"position offsets for {None if self.offsets is None else self.offsets.shape[-1]} "
                f"tokens met a forward of {positions.shape[-1]}."
            )
        return positions + self.offsets.to(positions.device)


@contextmanager
def position_skips(model: nn.Module) -> Iterator[PositionSkips]:
    """Let positions be moved inside a patched model's rotary embeddings for a ``with`` block.

    Args:
        model: A patched model.

    Yields:
        What to set the offsets on.

    Raises:
        RopeError: If the model is not patched, or keeps its angles in a table.
    """
    patch = patch_of(model)
    rotaries = [
        module
        for module in model.modules()
        if isinstance(module, ExtendedRotary) and module.patch is patch
    ]
    if not rotaries or any(isinstance(module, ExtendedTable) for module in rotaries):
        raise RopeError(
            "skip-wise positions need a model that patch_model has patched and whose family "
            "computes its angles from positions."
        )
    skips = PositionSkips()
    hooks = [module.register_forward_pre_hook(skips, with_kwargs=True) for module in rotaries]
    try:
        yield skips
    finally:
        for hook in hooks:
            hook.remove()

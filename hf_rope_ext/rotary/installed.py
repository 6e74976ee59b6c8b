"""The patch that is in force in a model."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_rope_ext.changes import Change, SetAttributes
from hf_rope_ext.checks import shown
from hf_rope_ext.errors import UnsupportedModelError
from hf_rope_ext.methods import Method
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.models.sites import RopeSite
from hf_rope_ext.positions.layouts import MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.rotation import Rotation


@dataclass(frozen=True, eq=False)
class Resolved:
    """A call of `patch_model` resolved against one model: everything it will change.

    Args:
        method: The method.
        sites: The sets of frequencies it extends.
        rotations: How each of those sets is computed, in the same order.
        temperature: Where the method's temperature goes, ``"rotation"`` or ``"logits"``.
        configs: The config attributes that change.
        record: The record in the first config, from which the patch can be applied again.
        axes: Names of the position axes.
        softmax: The softmax scales that change.
        layout: The M-RoPE layout in place of the trained one, if any.
        visual: How visual tokens are placed, None for the model's own rule.
        target: ``"text"`` or ``"vision"``.
        changes: Everything the patch does to the model, in order of application.
    """

    method: Method
    sites: list[RopeSite]
    rotations: list[Rotation]
    temperature: str
    configs: list[SetAttributes]
    record: dict[str, Any]
    axes: tuple[str, ...]
    softmax: list[SetAttributes] = field(default_factory=list)
    layout: MRopeLayout | None = None
    visual: VisualPositions | None = None
    target: str = "text"
    changes: list[Change] = field(default_factory=list)

    @property
    def has_stock_form(self) -> bool:
        """Whether stock transformers has the same pairs, token positions and attention."""
        is_attention = attention_rules(self.method) is not None
        return self.visual is None and self.layout is None and not is_attention

    @property
    def rotaries(self) -> dict[str, ExtendedRotary]:
        """The new rotary modules by path."""
        swaps = [change for change in self.changes if isinstance(change, SwapRotary)]
        return {swap.module.path: swap.module for swap in swaps}


@dataclass(eq=False)
class SwapRotary:
    """Replacement of a rotary module, or table, by an `ExtendedRotary`.

    Args:
        module: The new module.
        places: Every parent module and attribute name that holds the original.
    """

    module: ExtendedRotary
    places: list[tuple[nn.Module, str]]
    applied: bool = field(default=False, init=False)

    @property
    def parents(self) -> set[nn.Module]:
        """The modules that hold it."""
        return {parent for parent, _ in self.places}

    def apply(self) -> None:
        """Put the new module in."""
        self.applied = True
        self.module.follow(self.module.original)
        for parent, name in self.places:
            setattr(parent, name, self.module)
        hook = getattr(self.module.original, "_hf_hook", None)
        if hook is not None:  # accelerate's, which moves inputs to the module's device
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(self.module, hook)

    def revert(self) -> None:
        """Put the original back."""
        if not self.applied:
            return
        original = self.module.take_original()
        for parent, name in self.places:
            if isinstance(original, Tensor):
                if name in parent._modules:
                    delattr(parent, name)
                parent.register_buffer(name, original, persistent=False)
            else:
                setattr(parent, name, original)
        self.applied = False


def find_places(model: nn.Module, original: nn.Module | Tensor) -> list[tuple[nn.Module, str]]:
    """Return every parent module and attribute name that holds a module or buffer."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, part in [*parent._modules.items(), *parent._buffers.items()]
        if part is original
    ]


def patch_of(model: nn.Module, target: str = "text") -> Resolved | None:
    """Return the patch of a model's text or vision towers, or None.

    Raises:
        UnsupportedModelError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is a torch.nn.Module that holds a transformers model, got {shown(model)}."
        )
    for module in model.modules():
        patch = module.patch if isinstance(module, ExtendedRotary) else None
        if isinstance(patch, Resolved) and patch.target == target:
            return patch
    return None

"""What a patch in force consists of."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_rope_ext.errors import (
    UnsupportedModelError,
)
from hf_rope_ext.methods import (
    Method,
)
from hf_rope_ext.models.family import Config
from hf_rope_ext.models.rope_config import ConfigChange
from hf_rope_ext.models.sites import RopeSite
from hf_rope_ext.models.temperature import SoftmaxChange
from hf_rope_ext.positions.layouts import MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.rotation import Rotation


@dataclass(frozen=True, eq=False)
class Resolved:
    """What a request comes down to on one model."""

    method: Method
    sites: list[RopeSite]
    rotations: list[Rotation]
    temperature: str
    softmax: list[SoftmaxChange]
    configs: list[ConfigChange]
    layout: MRopeLayout | None
    visual: VisualPositions | None
    axes: tuple[str, ...]
    target: str = "text"

    @property
    def has_stock_form(self) -> bool:
        """Whether pairs and tokens stand where stock transformers has them, whatever the method."""
        return self.visual is None and self.layout is None


@dataclass(eq=False)
class Patch:
    """What one `patch_model` did, for undoing it; its rotary modules all refer to it."""

    resolved: Resolved
    configs_before: list["ConfigBefore"]


@dataclass(eq=False)
class ConfigBefore:
    """Attributes of a config as they were; those ``added`` were not there."""

    config: Config
    values: dict[str, Any]
    added: tuple[str, ...]


def patch_of(model: nn.Module, target: str = "text") -> Patch | None:
    """Return the patch of a model's text or vision, None where there is none.

    Raises:
        UnsupportedModelError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is a torch.nn.Module that holds a transformers model, got {model!r}."
        )
    for module in model.modules():
        patch = module.patch if isinstance(module, ExtendedRotary) else None
        if isinstance(patch, Patch) and patch.resolved.target == target:
            return patch
    return None

"""How long a request is to RoPE: in positions, of which images take fewer than tokens."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.patching import patch_of
from hf_rope_ext.sites import read_sites


@dataclass(frozen=True)
class RequestLength:
    """The length of the longest row of a batch.

    Args:
        tokens: Without padding.
        positions: Largest position + 1, over all axes of M-RoPE.
        trained: The model's trained length, in positions.
    """

    tokens: int
    positions: int
    trained: int

    @property
    def factor(self) -> float:
        """The smallest factor that fits."""
        return max(self.positions / self.trained, 1.0)


def request_length(model: nn.Module, **inputs: Any) -> RequestLength:
    """Measure a request before it is run.

    Args:
        model: The model it is for, patched or not.
        **inputs: What the model would be called with: a tokenizer's or a processor's output.

    Raises:
        RopeError: If there are no ``input_ids``, or the model has no rotary embedding.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise RopeError(f"input_ids must be a tensor, got {ids!r}.")
    mask = inputs.get("attention_mask")
    tokens = ids.shape[1] if mask is None else int(mask.sum(dim=1).max())
    patch = patch_of(model)
    sites = read_sites(model) if patch is None else patch.resolved.sites
    positions = inputs.get("position_ids")
    if positions is None:
        positions = _m_rope_positions(model, inputs)
    return RequestLength(
        tokens=tokens,
        positions=tokens if positions is None else int(positions.max()) + 1,
        trained=sites[0].geometry.original_max_position_embeddings,
    )


def _m_rope_positions(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Return the positions a model gives images and text, None where it only has text."""
    if not any(name.endswith("grid_thw") and inputs[name] is not None for name in inputs):
        return None
    for part in model.modules():
        index = getattr(part, "get_rope_index", None)
        if index is not None:
            known = inspect.signature(index).parameters
            found = index(**{name: value for name, value in inputs.items() if name in known})
            return found[0]  # type: ignore[no-any-return]
    return None

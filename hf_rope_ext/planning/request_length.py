"""How long a request is to RoPE: in positions, of which images take fewer than tokens."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.family import Config, family_of
from hf_rope_ext.models.sites import RopeSite, read_sites
from hf_rope_ext.patching.placed_index import PlacedIndex
from hf_rope_ext.rotary.axes import axis_names
from hf_rope_ext.rotary.installed import patch_of

# what a processor calls it, and what the family's position rule does
_RULE_NAMES = {
    "video_second_per_grid": "second_per_grids",
    "audio_feature_lengths": "audio_seqlens",
}
_ALWAYS = {"input_ids", "attention_mask", "mm_token_type_ids", "kwargs"}


@dataclass(frozen=True)
class RequestLength:
    """The length of a batch; where its rows differ, that of the longest.

    Args:
        tokens: Without padding.
        positions: Largest position + 1, over all axes of M-RoPE.
        trained: The model's trained length, in positions; 0 where its config does not say it.
        largest: Largest position of each axis of M-RoPE; empty where the model has one axis.
        assumed: What was taken for granted for want of a processor.
    """

    tokens: int
    positions: int
    trained: int
    largest: Mapping[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """The smallest factor that fits; 1 where the trained length is enough.

        Raises:
            RopeError: If the trained length is not known.
        """
        return self._factor(self.positions)

    @property
    def factors(self) -> dict[str, float]:
        """The smallest factor that fits each axis, for ``patch_model(factor=...)``."""
        return {axis: self._factor(last + 1) for axis, last in self.largest.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "factor": self.factor, "factors": self.factors}

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} up to {last}" for axis, last in self.largest.items())
        words = f"{self.tokens} tokens, {self.positions} positions" + (f" ({axes})" if axes else "")
        if not self.trained:
            return f"{words}; the config does not say what length was trained"
        fits = f"factor {self.factor:g}" if self.factor > 1 else "fits"
        return f"{words}, {self.trained} trained: {fits}"

    def _factor(self, positions: int) -> float:
        if not self.trained:
            raise RopeError(
                "the config does not say what length was trained; patch the model with "
                "original_max_position_embeddings first."
            )
        return max(positions / self.trained, 1.0)


def request_length(model: nn.Module, *, max_new_tokens: int = 0, **inputs: Any) -> RequestLength:
    """Measure a request before it is run; a model's ``rope_deltas`` are neither read nor changed.

    Args:
        model: The model it is for, patched or not.
        max_new_tokens: How many ``generate`` shall write behind it.
        **inputs: What the model would be called with: a tokenizer's or a processor's output.

    Raises:
        RopeError: If there are no ``input_ids``, the model has no rotary embedding, or its images
            and videos do not match the ids.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise RopeError(
            f"input_ids must be a tensor of shape (batch, seq), got {ids!r}; tokenizers and "
            f"processors return one with return_tensors='pt'."
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    elif mask.shape != ids.shape:
        raise RopeError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, to tell what is "
            f"padding; got {tuple(mask.shape)}."
        )
    patch = patch_of(model)
    site = (read_sites(model) if patch is None else patch.sites)[0]
    part = position_rule(model, site)
    axes = axis_names(site.rotary, site.label)
    positions = inputs.get("position_ids")
    if positions is None and part is not None:
        positions = _rule_positions(part, {**inputs, "attention_mask": mask})
    tokens = int(mask.sum(dim=1).max())
    if positions is None:
        positions = (mask.cumsum(dim=1) - 1)[None]
    elif positions.dim() == 2:
        positions = positions[None]
    # a row more than there are axes is Qwen3's running count, which builds masks
    found = _largest(positions[-len(axes) :], mask, max_new_tokens)
    largest = found.expand(len(axes)).tolist()
    return RequestLength(
        tokens=tokens + max_new_tokens,
        positions=max(largest) + 1,
        trained=site.geometry.original_max_position_embeddings,
        largest=dict(zip(axes, largest, strict=True)) if len(axes) > 1 else {},
    )


def _largest(positions: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
    """Return the largest position of each row of ``(axes, batch, seq)``, of all tokens but padding.

    `generate` goes on behind the last token, though an earlier one can have a larger position.
    """
    # up to the next whole one: positions that `visual_positions` placed may lie between two
    positions = torch.where(mask.bool(), positions, 0).ceil().long()
    order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    rows = torch.arange(len(mask), device=mask.device)
    last = positions[:, rows, (mask * order).argmax(dim=1)]
    return torch.maximum(positions.amax(dim=2), last + max_new_tokens).amax(dim=1)


def position_rule(model: nn.Module, site: RopeSite) -> Any:
    """Return the part of a model that gives images and text their positions, None without M-RoPE.

    It holds the rotary module: other towers can have rules of their own.
    """
    for part in model.modules():
        if hasattr(part, "get_rope_index") and site.rotary.parent in set(part.modules()):
            return part
    return None


def visual_tokens(config: Config, grid: Tensor, *, video: bool) -> Tensor:
    """Return how many tokens stand for each image or video, ``(visuals,)``.

    Args:
        config: The whole config.
        grid: Patches over time, height and width, ``(visuals, 3)``, before merging.
        video: Whether they are videos, of which some families merge frames as well.
    """
    vision = config.vision_config
    merge = vision.spatial_merge_size
    time, height, width = grid.unbind(dim=1)
    if video:
        time = time // getattr(vision, "temporal_merge_size", 1)
    rows, columns = height // merge, width // merge
    tokens: Tensor = time * rows * columns
    return tokens + (rows + 2) if family_of(config).row_ends else tokens


def _rule_positions(part: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Return what the family's own rule gives the inputs; None where all is text."""
    known = inspect.signature(part.get_rope_index).parameters
    given = {_RULE_NAMES.get(name, name): value for name, value in inputs.items()}
    if (audio := inputs.get("feature_attention_mask")) is not None:
        given["audio_seqlens"] = audio.sum(dim=-1)
    if given.get("second_per_grids") is not None:
        given["second_per_grids"] = torch.as_tensor(given["second_per_grids"])
    given = {name: value for name, value in given.items() if name in known and value is not None}
    if not any(isinstance(given[name], Tensor) for name in given.keys() - _ALWAYS):
        return None
    if "mm_token_type_ids" in known and "mm_token_type_ids" not in given:
        raise RopeError(
            "there are images or videos but no mm_token_type_ids, which tell the model where they "
            "stand; the processor returns them beside input_ids."
        )
    _require_grids_match(part.config, given)
    try:
        return _copied(part).get_rope_index(**given)[0]  # type: ignore[no-any-return]
    except (
        AttributeError,
        IndexError,
        RuntimeError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        raise RopeError(
            f"{type(part).__name__} cannot place these images and videos among the tokens "
            f"({type(error).__name__}: {error}); pass the processor's output as it is."
        ) from error


def _copied(part: Any) -> Any:
    """Return a stand-in that takes what some rules leave on their model for the next call."""
    copied = copy.copy(part)
    if isinstance(own := copied.__dict__.get(PlacedIndex.name), PlacedIndex):
        copied.__dict__[PlacedIndex.name] = PlacedIndex(copied, own.rule, own.axes, own.next_text)
    return copied


def _require_grids_match(config: Config, given: Mapping[str, Any]) -> None:
    """Compare what the grids stand for with the tokens there are: rules ignore surplus grids."""
    family = family_of(config)
    if family.next_text is None or family.row_ends:
        return  # a rule of their own, where grids can also be of images yet to be drawn
    merge = config.vision_config.spatial_merge_size
    for kind, name in ((1, "image"), (2, "video")):
        grid = given.get(f"{name}_grid_thw")
        if grid is None:
            continue
        expected = int(visual_tokens(config, grid, video=kind == 2).sum())
        if "mm_token_type_ids" in given:
            found = int((given["mm_token_type_ids"] == kind).sum())
        else:
            found = int((given["input_ids"] == getattr(config, f"{name}_token_id")).sum())
        if expected != found:
            raise RopeError(
                f"{name}_grid_thw {grid.tolist()} stands for {expected} tokens of {merge} x "
                f"{merge} patches, but the ids have {found}; pass the processor's output as it is."
            )

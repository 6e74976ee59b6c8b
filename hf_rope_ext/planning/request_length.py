"""The length of a request in positions, of which images take fewer than tokens."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host
from hf_rope_ext.models.family import Config, family_of
from hf_rope_ext.models.sites import RopeSite, read_sites
from hf_rope_ext.patching.placed_index import PlacedIndex
from hf_rope_ext.rotary.axes import axis_names
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.rotary.request_plan import row_lengths

# from the name a processor uses to that of the family's position rule
_RULE_NAMES = {
    "video_second_per_grid": "second_per_grids",
    "audio_feature_lengths": "audio_seqlens",
}
_ALWAYS = {"input_ids", "attention_mask", "mm_token_type_ids", "kwargs"}


@dataclass(frozen=True)
class RequestLength:
    """The length of a request; in a batch, of its longest row.

    Args:
        tokens: Number of tokens without padding.
        positions: Largest position + 1, over all axes of M-RoPE.
        trained: Trained length of the model in positions; 0 if its config lacks it.
        largest: Largest position on each axis of M-RoPE; empty if the model has a single axis.
        assumed: Assumptions made in place of a missing processor.
    """

    tokens: int
    positions: int
    trained: int
    largest: Mapping[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """The smallest sufficient factor; 1 if the request fits the trained length.

        Raises:
            RopeError: If the trained length is unknown.
        """
        return self._factor(self.positions)

    @property
    def factors(self) -> dict[str, float]:
        """The smallest sufficient factor of each axis, for ``patch_model(factor=...)``."""
        return {axis: self._factor(last + 1) for axis, last in self.largest.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "factor": self.factor, "factors": self.factors}

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} up to {last}" for axis, last in self.largest.items())
        words = f"{self.tokens} tokens, {self.positions} positions" + (f" ({axes})" if axes else "")
        if not self.trained:
            return f"{words}; the trained length is not in the config"
        fits = f"factor {self.factor:g}" if self.factor > 1 else "fits"
        return f"{words}, {self.trained} trained: {fits}"

    def _factor(self, positions: int) -> float:
        if not self.trained:
            raise RopeError(
                "the trained length is not in the config; patch the model with "
                "original_max_position_embeddings first."
            )
        return max(positions / self.trained, 1.0)


def request_length(model: nn.Module, *, max_new_tokens: int = 0, **inputs: Any) -> RequestLength:
    """Measure a request before running it, without reading or changing the model's ``rope_deltas``.

    Args:
        model: The model it is for, patched or not.
        max_new_tokens: Number of tokens that ``generate`` will add.
        **inputs: Arguments of the model's call: the output of a tokenizer or a processor.

    Raises:
        RopeError: If ``input_ids`` are missing, the model has no rotary embedding, or images and
            videos do not match the ids.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise RopeError(
            f"input_ids must be a tensor of shape (batch, seq), got {ids!r}; call the tokenizer or "
            f"processor with return_tensors='pt'."
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    elif mask.shape != ids.shape:
        raise RopeError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, got "
            f"{tuple(mask.shape)}."
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
    # Qwen3-VL puts a row in front of its axes, a running count that builds masks
    by_axis = [
        row_lengths(own, mask, max_new_tokens, from_last=True) for own in positions[-len(axes) :]
    ]
    largest = [int(lengths.max()) - 1 for lengths in by_axis]
    largest = largest * (len(axes) // len(largest))  # one axis of text stands for all
    return RequestLength(
        tokens=tokens + max_new_tokens,
        positions=max(largest) + 1,
        trained=site.geometry.original_max_position_embeddings,
        largest=dict(zip(axes, largest, strict=True)) if len(axes) > 1 else {},
    )


def position_rule(model: nn.Module, site: RopeSite) -> Any:
    """Return the submodule that computes positions of images and text; None without M-RoPE.

    It is the one around the rotary module: other towers can have rules of their own.
    """
    for part in model.modules():
        if hasattr(part, host.POSITION_RULE) and site.rotary.parent in set(part.modules()):
            return part
    return None


def visual_tokens(config: Config, grid: Tensor, *, video: bool) -> Tensor:
    """Return the number of tokens of each image or video, ``(visuals,)``.

    Args:
        config: The whole config.
        grid: Patches over time, height and width, ``(visuals, 3)``, before merging.
        video: Whether they are videos; some families merge their frames, too.
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
    """Return the positions computed by the family's own rule; None for text alone."""
    known = inspect.signature(getattr(part, host.POSITION_RULE)).parameters
    arguments = {_RULE_NAMES.get(name, name): value for name, value in inputs.items()}
    if (audio := inputs.get("feature_attention_mask")) is not None:
        arguments["audio_seqlens"] = audio.sum(dim=-1)
    if arguments.get("second_per_grids") is not None:
        arguments["second_per_grids"] = torch.as_tensor(arguments["second_per_grids"])
    arguments = {
        name: value for name, value in arguments.items() if name in known and value is not None
    }
    if not any(isinstance(arguments[name], Tensor) for name in arguments.keys() - _ALWAYS):
        return None
    if "mm_token_type_ids" in known and "mm_token_type_ids" not in arguments:
        raise RopeError(
            "there are images or videos but no mm_token_type_ids, which mark their tokens; pass "
            "those the processor returns with input_ids."
        )
    _require_grids_match(part.config, arguments)
    try:
        return getattr(_copy_of(part), host.POSITION_RULE)(**arguments)[0]  # type: ignore[no-any-return]
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
            f"({type(error).__name__}: {error}); pass the processor's output as is."
        ) from error


def _copy_of(part: Any) -> Any:
    """Return a shallow copy, since some rules store values on their model for the next call."""
    copied = copy.copy(part)
    if isinstance(placed := copied.__dict__.get(PlacedIndex.name), PlacedIndex):
        copied.__dict__[PlacedIndex.name] = PlacedIndex(
            copied, placed.rule, placed.axes, placed.next_text
        )
    return copied


def _require_grids_match(config: Config, arguments: Mapping[str, Any]) -> None:
    """Check that grids and ids agree on the number of tokens; the rules ignore surplus grids."""
    family = family_of(config)
    if family.next_text is None or family.row_ends:
        return  # they have other rules, and their grids may include images yet to be generated
    merge = config.vision_config.spatial_merge_size
    for kind, name in ((1, "image"), (2, "video")):
        grid = arguments.get(f"{name}_grid_thw")
        if grid is None:
            continue
        expected = int(visual_tokens(config, grid, video=kind == 2).sum())
        if "mm_token_type_ids" in arguments:
            actual = int((arguments["mm_token_type_ids"] == kind).sum())
        else:
            actual = int((arguments["input_ids"] == getattr(config, f"{name}_token_id")).sum())
        if expected != actual:
            raise RopeError(
                f"{name}_grid_thw {grid.tolist()} stands for {expected} tokens of {merge} x "
                f"{merge} patches, but the ids have {actual}; pass the processor's output as is."
            )

"""Place the visual tokens of a patched model by a rule of our own, after the model's rule.

A vision-language model computes the positions of images, videos and text in one method. The patched
instance gets a stand-in for it; the class is not changed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.changes import SetAttributes, StandIn
from hf_rope_ext.errors import UnsupportedModelError
from hf_rope_ext.models import host
from hf_rope_ext.models.family import Config, family_of, text_configs
from hf_rope_ext.positions.placement import VisualPositions, place_visual_tokens

VISUAL_KINDS = (1, 2)
"""Image and video in ``mm_token_type_ids``; audio takes positions as text does."""


class PlacedIndex(StandIn):
    """Stands in for the method that computes the positions of a request.

    Args:
        model: The model.
        rule: The rule.
        axes: Names of the axes of its positions.
        next_text: The model's own rule for the text after them.
    """

    name = host.POSITION_RULE

    def __init__(
        self, model: nn.Module, rule: VisualPositions, axes: tuple[str, ...], next_text: str
    ) -> None:
        super().__init__(model)
        self.rule = rule
        self.axes = axes
        self.next_text = next_text

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return positions ``(axes, batch, seq)`` and their offsets from tokens, ``(batch, 1)``.

        Raises:
            RopeError: If the model's own positions do not follow its known rule.
        """
        positions, _ = self.stock(*args, **kwargs)
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        visual = self._visual(ids, arguments.get("mm_token_type_ids"))
        placed = place_visual_tokens(
            positions,
            visual,
            self.rule,
            axes=self.axes,
            next_text=self.next_text,
            attention_mask=mask,
        )
        kept = (torch.ones_like(ids) if mask is None else mask).bool().to(placed.device)
        longest = placed.masked_fill(~kept, 0).amax(dim=(0, 2))
        return placed, (longest + 1 - kept.sum(dim=1))[:, None]

    def _visual(self, ids: Tensor, kinds: Tensor | None) -> Tensor:
        if kinds is not None:
            return torch.where(torch.isin(kinds, torch.tensor(VISUAL_KINDS).to(kinds)), kinds, 0)
        visual = torch.zeros_like(ids)
        for kind, token in _visual_tokens(self.model.config):
            visual = torch.where(ids == token, kind, visual)
        return visual


def placement_changes(
    model: nn.Module, configs: list[Config], rule: VisualPositions, axes: tuple[str, ...]
) -> list[SetAttributes]:
    """Return the changes that make a model place visual tokens by a rule.

    Args:
        model: The model.
        configs: Configs of the patched text models.
        rule: The rule.
        axes: Names of the axes of positions.

    Raises:
        UnsupportedModelError: If no part of it computes positions of visual tokens.
    """
    parts = list(_indexed(model, configs))
    if not parts:
        raise UnsupportedModelError(
            f"visual_positions: no part of {type(model).__name__} places visual tokens (none has "
            f"{PlacedIndex.name}); nothing was changed."
        )
    return [PlacedIndex(part, rule, axes, next_text).change() for part, next_text in parts]


def places_tokens(model: nn.Module, configs: list[Config]) -> bool:
    """Return whether a part of the model computes the positions of one of these text models.

    Raises:
        UnsupportedModelError: If it does so by an unknown rule.
    """
    return any(_indexed(model, configs))


def _indexed(model: nn.Module, configs: list[Config]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the models that place tokens for these text models, with their rules for text."""
    for part in model.modules():
        if not hasattr(type(part), PlacedIndex.name):
            continue
        whole: Config = part.config
        if any(own is config for own in text_configs(whole) for config in configs):
            next_text = family_of(whole).next_text
            if next_text is None:
                raise UnsupportedModelError(
                    f"visual_positions on model_type={whole.model_type!r}: it does "
                    f"not place images as blocks followed by text. Nothing was changed."
                )
            yield part, next_text


def _visual_tokens(config: Config) -> Iterator[tuple[int, int]]:
    """Yield the kinds of visual tokens a config names, with their ids."""
    for kind, name in zip(VISUAL_KINDS, ("image", "video"), strict=True):
        for suffix in ("token_id", "token_index"):
            token = getattr(config, f"{name}_{suffix}", None)
            if token is not None:
                yield kind, token

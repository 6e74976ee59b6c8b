"""The length of a request with images and videos, from their sizes and a model's config alone."""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.checks import require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host
from hf_rope_ext.models.family import Config, family_of
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.planning.request_length import (
    RequestLength,
    position_rule,
    request_length,
    visual_tokens,
)
from hf_rope_ext.saving.loading import read_config, skeleton

Size = tuple[int, int] | tuple[int, int, int]
"""Width and height in pixels; or patches over time, height and width, as in a processor's grids."""


@dataclass(frozen=True)
class Video:
    """A video as passed to a model.

    Args:
        size: Of each frame.
        frames: Number of sampled frames; left out if ``size`` is a grid.
        fps: Sampled frames per second.
    """

    size: Size
    frames: int | None = None
    fps: float = 2.0


def visual_length(
    model: str | Path | Config | nn.Module,
    *,
    images: Sequence[Size] = (),
    videos: Sequence[Video] = (),
    text: int = 0,
) -> RequestLength:
    """Measure a request from the sizes of its images and videos, without weights or a tokenizer.

    The model's own rule places synthetic ids: first text, then images, then videos, the order that
    reaches furthest. Sizes in pixels become patches as the processor saved with the config resizes
    them; the result lists what had to be assumed without one.

    Args:
        model: Directory or hub id, config, or the model itself.
        images: Their sizes.
        videos: Their sizes and sampling.
        text: Number of text tokens, including those to be generated.

    Raises:
        RopeError: If the model has no M-RoPE or an unknown layout of visual tokens, or an image or
            a video is invalid.
    """
    source = model if isinstance(model, str | Path) else None
    whole = (
        model
        if isinstance(model, nn.Module)
        else skeleton(model if source is None else read_config(source)[0])
    )
    site = read_sites(whole)[0]
    part = position_rule(whole, site)
    if part is None:
        raise RopeError(
            f"{type(whole).__name__} has no M-RoPE, so positions are tokens; count them with its "
            f"processor."
        )
    if family_of(part.config).next_text is None:
        raise RopeError(
            f"the config does not tell how {type(part).__name__} lays out its visual tokens; pass "
            f"its processor's output to request_length."
        )
    rule = inspect.signature(getattr(part, host.POSITION_RULE))
    if videos and "video_grid_thw" not in rule.parameters:
        raise RopeError(f"{type(part).__name__} takes no videos; leave them out.")
    require_integer("text", text, 0, unit="tokens")
    if not (text or images or videos):
        raise RopeError("the request is empty; give text, images or videos.")
    apart = site.family.frames_apart
    resizer, request = _Resizer(source, part.config, apart), _MadeUp(part.config, apart)
    request.add_text(text)
    for size in images:
        request.add_image(resizer.image(size))
    for video in videos:
        request.add_video(resizer.video(video), video.fps)
    length = request_length(whole, **request.inputs())
    return replace(length, assumed=tuple(sorted(resizer.assumed | request.assumed)))


class _Resizer:
    """Converts sizes to grids of patches, and records the assumptions made."""

    def __init__(self, source: str | Path | None, config: Config, frames_apart: bool) -> None:
        self.vision = config.vision_config
        self.side = self.vision.patch_size * self.vision.spatial_merge_size
        self.whole_videos = frames_apart  # their pixel limit applies to all frames together
        self.assumed: set[str] = set()
        self._processor = None if source is None else _image_processor(source)
        self._video_settings = {} if source is None else _video_settings(source)
        self._known: dict[Size, tuple[int, int, int]] = {}

    def image(self, size: Size) -> tuple[int, int, int]:
        if len(size) == 3 and size[0] != 1:
            raise RopeError(f"the grid of an image must have one frame, got {size!r}.")
        if size not in self._known:
            self._known[size] = self._grid(size) or self._processed(*size[:2])
        return self._known[size]

    def video(self, video: Video) -> tuple[int, int, int]:
        require_number("fps", video.fps, above=0)
        merge = getattr(self.vision, "temporal_merge_size", 1)
        if (grid := self._grid(video.size)) is not None:
            if video.frames is not None:
                raise RopeError(
                    f"the grid already has the number of frames; leave frames out of {video!r}."
                )
            if grid[0] % merge:
                raise RopeError(f"frames of a grid must be a multiple of {merge}, got {grid!r}.")
            return grid
        require_integer("frames of a video", video.frames, 1)
        assert video.frames is not None  # checked above
        step = _frames_per_patch(self.vision)
        bounds = self._bounds(self._video_settings, "videos")
        rows, columns = self._resized(*video.size[:2], video.frames, step, bounds)
        return math.ceil(video.frames / step / merge) * merge, rows, columns

    def _grid(self, size: Size) -> tuple[int, int, int] | None:
        if min(size) < 1:
            raise RopeError(f"each side of a size must be at least 1, got {size!r}.")
        if len(size) == 2:
            return None
        merge = self.vision.spatial_merge_size
        if size[1] % merge or size[2] % merge:
            raise RopeError(
                f"rows and columns of a grid must be multiples of {merge}, got {size!r}."
            )
        return size

    def _processed(self, width: int, height: int) -> tuple[int, int, int]:
        if self._processor is None:
            bounds = self._bounds({}, "images")
            return (1, *self._resized(width, height, 1, 1, bounds))
        blank = torch.zeros(3, height, width, dtype=torch.uint8)
        try:
            grid = self._processor(images=[blank], return_tensors="pt")["image_grid_thw"]
        except (KeyError, ValueError) as error:
            raise RopeError(f"{width}x{height}: {error}") from error
        return tuple(grid[0].tolist())

    def _bounds(self, settings: Mapping[str, Any], what: str) -> dict[str, float]:
        size = settings.get("size") or {}
        smallest = size.get("shortest_edge") or settings.get("min_pixels")
        largest = size.get("longest_edge") or settings.get("max_pixels")
        if not smallest or not largest:
            self.assumed.add(
                f"{what}: sides rounded to multiples of {self.side} pixels without a limit, for "
                f"lack of a processor config with limits"
            )
            smallest, largest = self.side**2, math.inf
        return {"min_pixels": smallest, "max_pixels": largest}

    def _resized(
        self, width: int, height: int, frames: int, step: int, bounds: Mapping[str, float]
    ) -> tuple[int, int]:
        """Return rows and columns of patches, by the two rules that transformers' processors share.

        The processors for videos require torchvision; the same functions for images do not.
        """
        from transformers.models.glm4v import image_processing_pil_glm4v as glm4v
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

        try:
            if self.whole_videos and frames > 1:
                sides = glm4v.smart_resize(frames, height, width, step, factor=self.side, **bounds)
            else:
                sides = qwen2_vl.smart_resize(height, width, factor=self.side, **bounds)
        except ValueError as error:
            raise RopeError(f"{width}x{height}: {error}") from error
        return sides[0] // self.vision.patch_size, sides[1] // self.vision.patch_size


def _frames_per_patch(vision: Config) -> int:
    return getattr(vision, "temporal_patch_size", None) or 1


def _image_processor(source: str | Path) -> Any:
    """Return the image processor saved with a config; None if there is none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError):
        return None


def _video_settings(source: str | Path) -> dict[str, Any]:
    """Return the video settings saved with a config, from where transformers looks for them."""
    from transformers.utils import cached_file

    for name, key in (
        ("processor_config.json", "video_processor"),
        ("video_preprocessor_config.json", None),
        ("preprocessor_config.json", None),
    ):
        path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        settings = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        if video_settings := settings.get(key) if key else settings:
            return video_settings
    return {}


class _MadeUp:
    """Builds what a processor would return, with a single placeholder word as text."""

    def __init__(self, config: Config, frames_apart: bool) -> None:
        self.config = config
        self.frames_apart = frames_apart
        self.assumed: set[str] = set()
        names = ("image", "video", "audio", "vision_start", "audio_start")
        tokens = {name: getattr(config, f"{name}_token_id", -1) for name in names}
        self._word = next(number for number in count() if number not in tokens.values())
        self._tokens = {name: self._word if id_ < 0 else id_ for name, id_ in tokens.items()}
        self._spans: list[tuple[int, int, int]] = []  # id, kind and length
        self._grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
        self._seconds: list[float] = []  # from one grid in time to the next

    def add_text(self, tokens: int) -> None:
        self._spans.append((self._word, 0, tokens))

    def add_image(self, grid: tuple[int, int, int]) -> None:
        self._grids["image"].append(grid)
        tokens = int(visual_tokens(self.config, torch.tensor([grid]), video=False))
        self._add_visual("image", 1, tokens)

    def add_video(self, grid: tuple[int, int, int], fps: float) -> None:
        self._grids["video"].append(grid)
        self._seconds.append(_frames_per_patch(self.config.vision_config) / fps)
        tokens = int(visual_tokens(self.config, torch.tensor([grid]), video=True))
        if not self.frames_apart:
            self._add_visual("video", 2, tokens)
            return
        for frame in range(grid[0]):
            self.add_text(len(f"{frame * self._seconds[-1]:.1f}") + 3)
            self._add_visual("video", 2, tokens // grid[0])
        self.assumed.add("<1.5 seconds> before each frame of a video, one token per digit")

    def inputs(self) -> dict[str, Any]:
        ids, kinds, lengths = torch.tensor(self._spans).unbind(dim=1)
        seconds = torch.tensor(self._seconds)
        return {
            "input_ids": ids.repeat_interleave(lengths)[None],
            "mm_token_type_ids": kinds.repeat_interleave(lengths)[None],
            **{
                f"{name}_grid_thw": torch.tensor(grids)
                for name, grids in self._grids.items()
                if grids
            },
            # as Qwen2.5-VL's processor calls them, and Qwen2.5-Omni's
            **dict.fromkeys(("second_per_grid_ts", "video_second_per_grid"), seconds),
        }

    def _add_visual(self, name: str, kind: int, tokens: int) -> None:
        self._spans.append((self._tokens["vision_start"], 0, 1))
        self._spans.append((self._tokens[name], kind, tokens))
        self.add_text(1)

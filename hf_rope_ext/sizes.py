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

from hf_rope_ext.errors import RopeError
from hf_rope_ext.families import Config, family_of
from hf_rope_ext.loading import read_config, skeleton
from hf_rope_ext.measuring import RequestLength, position_rule, request_length, visual_tokens
from hf_rope_ext.sites import read_sites

Size = tuple[int, int] | tuple[int, int, int]
"""Width and height in pixels; or patches over time, height and width, as in a processor's grids."""


@dataclass(frozen=True)
class Video:
    """A video as a model gets it.

    Args:
        size: Of each frame.
        frames: How many are sampled; not said where ``size`` is a grid.
        fps: How many are sampled per second.
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
    """Measure a request that is not there yet; needs neither weights nor a tokenizer.

    The model's own rule places made-up ids: the text, then the images, then the videos, since in
    this order they reach furthest. Sizes in pixels become patches as the processor beside the
    config resizes them; what had to be assumed without one stands in the result.

    Args:
        model: Directory or hub id, config, or the model itself.
        images: Their sizes.
        videos: What of them is sampled.
        text: How many tokens of text there are besides.

    Raises:
        RopeError: If the model has no M-RoPE or another layout of visual tokens, or there is no
            such image or video.
    """
    source = model if isinstance(model, str | Path) else None
    whole = (
        model
        if isinstance(model, nn.Module)
        else skeleton(model if source is None else read_config(source)[0])
    )
    part = position_rule(whole, read_sites(whole)[0])
    if part is None:
        raise RopeError(
            f"{type(whole).__name__} has no M-RoPE, so an image takes as many positions as tokens; "
            f"count them with its processor."
        )
    vision = getattr(part.config, "vision_config", None)
    if getattr(vision, "spatial_merge_size", 1) < 2:
        raise RopeError(
            f"how {type(part).__name__} lays out its visual tokens is not known from the config; "
            f"give request_length its processor's output."
        )
    if videos and "video_grid_thw" not in inspect.signature(part.get_rope_index).parameters:
        raise RopeError(f"{type(part).__name__} takes no videos.")
    if text < 0 or not text + len(images) + len(videos):
        raise RopeError(f"a request has text, images or videos, got text={text!r} alone.")
    resizer = _Resizer(source, part.config)
    image_grids = [resizer.image(size) for size in images]
    video_grids = [resizer.video(video) for video in videos]
    inputs = _made_up(part.config, image_grids, video_grids, videos, text)
    if family_of(part.config).frames_apart and videos:
        resizer.assumed.add("times before frames: a token for each digit, point, bracket and word")
    return replace(request_length(whole, **inputs), assumed=tuple(sorted(resizer.assumed)))


class _Resizer:
    """From sizes to grids of patches, remembering what had to be assumed."""

    def __init__(self, source: str | Path | None, config: Config) -> None:
        self.vision = config.vision_config
        self.side = self.vision.patch_size * self.vision.spatial_merge_size
        self.whole_videos = family_of(config).frames_apart  # these share one limit on pixels
        self.assumed: set[str] = set()
        self._processor = None if source is None else _image_processor(source)
        self._video_settings = {} if source is None else _video_settings(source)
        self._known: dict[Size, tuple[int, int, int]] = {}

    def image(self, size: Size) -> tuple[int, int, int]:
        if size not in self._known:
            self._known[size] = self._grid(size) or self._processed(*size[:2])
        return self._known[size]

    def video(self, video: Video) -> tuple[int, int, int]:
        if not video.fps > 0:
            raise RopeError(f"fps must be greater than 0, got {video.fps!r}.")
        if (grid := self._grid(video.size)) is not None:
            if video.frames is not None:
                raise RopeError(f"{video!r} says twice how many frames there are.")
            return grid
        if video.frames is None or video.frames < 1:
            raise RopeError(f"a video needs frames, at least 1; got {video!r}.")
        step = _frames_per_patch(self.vision)
        bounds = self._bounds(self._video_settings, "videos")
        rows, columns = self._resized(*video.size[:2], video.frames, step, bounds)
        return math.ceil(video.frames / step), rows, columns

    def _grid(self, size: Size) -> tuple[int, int, int] | None:
        if min(size) < 1:
            raise RopeError(f"a size must be at least 1 each way, got {size!r}.")
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
            found = self._processor(images=[blank], return_tensors="pt")["image_grid_thw"]
        except (KeyError, ValueError) as error:
            raise RopeError(f"{width}x{height}: {error}") from error
        return tuple(found[0].tolist())

    def _bounds(self, settings: Mapping[str, Any], what: str) -> dict[str, float]:
        size = settings.get("size") or {}
        smallest = size.get("shortest_edge") or settings.get("min_pixels")
        largest = size.get("longest_edge") or settings.get("max_pixels")
        if not smallest or not largest:
            self.assumed.add(
                f"{what}: sides rounded to multiples of {self.side} pixels, however large, since "
                f"there is no processor's config with limits"
            )
            smallest, largest = self.side**2, math.inf
        return {"min_pixels": smallest, "max_pixels": largest}

    def _resized(
        self, width: int, height: int, frames: int, step: int, bounds: Mapping[str, float]
    ) -> tuple[int, int]:
        """Return rows and columns of patches, by the two rules that transformers' processors share.

        Those for videos need torchvision, but the same functions serve images without it.
        """
        from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as whole
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as each

        try:
            if self.whole_videos and frames > 1:
                found = whole(frames, height, width, step, factor=self.side, **bounds)
            else:
                found = each(height, width, factor=self.side, **bounds)
        except ValueError as error:
            raise RopeError(f"{width}x{height}: {error}") from error
        return found[0] // self.vision.patch_size, found[1] // self.vision.patch_size


def _frames_per_patch(vision: Config) -> int:
    return getattr(vision, "temporal_patch_size", None) or 1


def _image_processor(source: str | Path) -> Any:
    """Return the image processor beside a config, None where there is none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError):
        return None


def _video_settings(source: str | Path) -> dict[str, Any]:
    """Return what is said about videos beside a config, where transformers looks for it."""
    from transformers.utils import cached_file

    for name, key in (
        ("processor_config.json", "video_processor"),
        ("video_preprocessor_config.json", None),
        ("preprocessor_config.json", None),
    ):
        path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        settings = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        if found := settings.get(key) if key else settings:
            return found
    return {}


def _made_up(
    config: Config,
    images: Sequence[tuple[int, int, int]],
    grids: Sequence[tuple[int, int, int]],
    videos: Sequence[Video],
    text: int,
) -> dict[str, Any]:
    """Return what a processor would, with one meaningless word for all text."""
    names = ("image", "video", "audio", "vision_start", "vision_end", "audio_start")
    special: dict[str, int] = {name: getattr(config, f"{name}_token_id", -1) for name in names}
    word = next(number for number in count() if number not in special.values())
    start = word if special["vision_start"] < 0 else special["vision_start"]
    step = _frames_per_patch(config.vision_config)
    spans = [(word, 0, text)]  # id, kind and length
    for grid in images:
        length = int(visual_tokens(config, torch.tensor([grid]), video=False))
        spans += [(start, 0, 1), (special["image"], 1, length), (word, 0, 1)]
    for grid, video in zip(grids, videos, strict=True):
        length = int(visual_tokens(config, torch.tensor([grid]), video=True))
        times: list[float | None] = [None]
        if family_of(config).frames_apart:
            times = [frame * step / video.fps for frame in range(grid[0])]
        for time in times:
            words = 0 if time is None else len(f"{time:.1f}") + 3  # "<", " seconds" and ">"
            spans += [(word, 0, words), (start, 0, 1)]
            spans += [(special["video"], 2, length // len(times)), (word, 0, 1)]
    ids, kinds, lengths = torch.tensor(spans).unbind(dim=1)
    inputs: dict[str, Any] = {
        "input_ids": ids.repeat_interleave(lengths)[None],
        "mm_token_type_ids": kinds.repeat_interleave(lengths)[None],
    }
    if images:
        inputs["image_grid_thw"] = torch.tensor(images)
    if grids:
        inputs["video_grid_thw"] = torch.tensor(grids)
        seconds = torch.tensor([step / video.fps for video in videos])
        inputs |= {"second_per_grid_ts": seconds, "video_second_per_grid": seconds}
    return inputs

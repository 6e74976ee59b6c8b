"""Prompts of text around images and videos, for the tiny models of `zoo` whose positions have axes.

The families differ in the layout of the pixels, the tokens around an image, and whether a video is
one span of tokens or one per frame; `FAMILIES` says how, and everything else is shared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

IMAGE, VIDEO, START, END = 6, 7, 5, 9  # as `zoo` configures its models
SPECIAL = [*range(3, 10)]  # tokens that `generate` shall not write
# rows and columns in tokens: not square, so that no axis passes for another
IMAGE_GRID, FRAME_GRID, FRAMES = (2, 4), (4, 2), 4


@dataclass(frozen=True)
class Seen:
    """How a family is shown an image.

    Args:
        patch: Numbers of a patch, in the shape the vision tower takes.
        merge: Patches that one token stands for, along each side.
        image: Whether it is shown an image, also where it is shown a video.
        video: ``"whole"`` where a video is one span of tokens, ``"frames"`` where each frame is
            one; None where the family takes none, and is shown a second image.
        frames: Frames of a grid that stand behind one token.
        video_token: The token that stands for a part of a frame.
        more: Image tokens beyond those of the grid: per row, and per image.
    """

    patch: tuple[int, ...] = (3 * 2 * 16 * 16,)
    merge: int = 2
    image: bool = True
    video: str | None = None
    frames: int = 1
    video_token: int = VIDEO
    more: tuple[int, int] = (0, 0)


_ONE_FRAME = (3 * 16 * 16,)

FAMILIES = {
    "cohere_compass": Seen(video="frames"),
    "cosmos3_edge": Seen(_ONE_FRAME, video="frames"),
    "cosmos3_omni": Seen(video="frames"),
    "ernie4_5_vl_moe": Seen(_ONE_FRAME, video="whole", frames=2),
    # a frame of GLM's videos is written with image tokens, and a prompt holds either
    "glm46v": Seen(),
    "glm4v": Seen(image=False, video="frames", video_token=IMAGE),
    "glm4v_moe": Seen(image=False, video="frames", video_token=IMAGE),
    "glm_image": Seen(_ONE_FRAME, merge=1),
    "glm_ocr": Seen(),
    "glmga": Seen(),
    "hunyuan_vl": Seen(_ONE_FRAME, more=(1, 2)),
    "minicpmv4_7": Seen((3, 16, 16), merge=4, video="frames"),
    "neomme": Seen(_ONE_FRAME, merge=1, more=(0, 1)),
    "paddleocr_vl": Seen((3, 16, 16)),
    "qwen2_5_omni_thinker": Seen(video="whole"),
    "qwen2_5_vl": Seen(video="whole"),
    "qwen2_vl": Seen(video="whole"),
    "qwen3_5": Seen(video="frames"),
    "qwen3_5_moe": Seen(video="frames"),
    "qwen3_omni_moe_thinker": Seen(video="whole"),
    "qwen3_vl": Seen(video="frames"),
    "qwen3_vl_moe": Seen(video="frames"),
    "qwen4_exp": Seen(video="frames"),
}


def image_inputs(
    model: PreTrainedModel, words: int = 60, padded: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Arguments for a forward of `model`, or its `generate`, on text around images and a video.

    Args:
        model: From `zoo.build`, of a type in `FAMILIES`.
        words: Tokens of the text at the end.
        padded: Whether a second row of text alone stands beside it, padded on the left.
        seed: Determines text and pixels.
    """
    model_type = model.config.model_type
    seen = FAMILIES[model_type]
    prompt = _Prompt(seen, torch.Generator().manual_seed(seed))
    prompt.text(4)
    if seen.image:
        prompt.image()
    prompt.text(3)
    if seen.video:
        prompt.video()
    elif model_type != "glm_image":
        prompt.image()
    prompt.text(words)
    arguments = prompt.arguments(padded)
    return _OWN[model_type](prompt, arguments) if model_type in _OWN else arguments


class _Prompt:
    """A prompt under construction: a row of tokens, the kind of each, and what they stand for."""

    def __init__(self, seen: Seen, generator: torch.Generator) -> None:
        self.seen = seen
        self.generator = generator
        self.ids: list[int] = []
        self.kinds: list[int] = []  # 0 text, 1 image, 2 video
        self.grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}

    def text(self, length: int) -> None:
        ids = torch.randint(10, 128, (length,), generator=self.generator)
        self._add(ids.tolist())

    def image(self) -> None:
        rows, columns = IMAGE_GRID
        per_row, per_image = self.seen.more
        self._add([START])
        self._add([IMAGE] * (rows * (columns + per_row) + per_image), kind=1)
        self._add([END])
        self.grids["image"].append((1, rows * self.seen.merge, columns * self.seen.merge))

    def video(self) -> None:
        rows, columns = FRAME_GRID
        spans = FRAMES // self.seen.frames
        spans, tokens = (1, spans) if self.seen.video == "whole" else (spans, 1)
        for _ in range(spans):
            self._add([START])
            self._add([self.seen.video_token] * (tokens * rows * columns), kind=2)
            self._add([END])
        self.grids["video"].append((FRAMES, rows * self.seen.merge, columns * self.seen.merge))

    def arguments(self, padded: bool) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if grids := self.grids[modality]:
                seen[name] = self.pixels(grids)
                seen[f"{modality}_grid_thw"] = torch.tensor(grids)
        ids = torch.tensor([self.ids])
        rows = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.tensor([self.kinds]),
        }
        if padded:
            length = ids.shape[1]
            text = torch.randint(10, 128, (1, length // 2), generator=self.generator)
            padding = torch.zeros(1, length - length // 2, dtype=torch.int64)
            other = {
                "input_ids": torch.cat((padding, text), dim=1),
                "attention_mask": torch.cat((padding, torch.ones_like(text)), dim=1),
                "mm_token_type_ids": torch.zeros_like(ids),
            }
            rows = {name: torch.cat((row, other[name])) for name, row in rows.items()}
        return rows | seen

    def pixels(self, grids: list[tuple[int, int, int]]) -> Tensor:
        patches = sum(frames * height * width for frames, height, width in grids)
        return torch.randn(patches, *self.seen.patch, generator=self.generator)

    def _add(self, ids: list[int], kind: int = 0) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)


def _glm_image(prompt: _Prompt, arguments: dict[str, Any]) -> dict[str, Any]:
    """Its images are drawn: the prompt ends where one begins, and names the grid of each row's."""
    start = torch.full_like(arguments["input_ids"][:, :1], START)
    drawn = torch.tensor([(1, *IMAGE_GRID)])
    rows = len(start)
    return {
        "input_ids": torch.cat((arguments["input_ids"], start), dim=1),
        "attention_mask": torch.cat((arguments["attention_mask"], torch.ones_like(start)), dim=1),
        "pixel_values": arguments["pixel_values"],
        "image_grid_thw": torch.cat((arguments["image_grid_thw"], *[drawn] * rows)),
        "images_per_sample": torch.tensor([2, 1][:rows]),
    }


def _minicpmv(prompt: _Prompt, arguments: dict[str, Any]) -> dict[str, Any]:
    """Its patches lie beside each other, and each frame is an image of its own."""
    own = {}
    for name, suffix, modality in (
        ("pixel_values", "", "image"),
        ("pixel_values_videos", "_videos", "video"),
    ):
        patches = arguments.pop(name)
        own[name] = patches.permute(1, 2, 0, 3).flatten(2)[None]
        grids = arguments.pop(f"{modality}_grid_thw")
        own[f"target_sizes{suffix}"] = grids[:, 1:].repeat_interleave(grids[:, 0], dim=0)
    return arguments | own


def _neomme(prompt: _Prompt, arguments: dict[str, Any]) -> dict[str, Any]:
    """It is given its positions, rows and columns."""
    del arguments["mm_token_type_ids"], arguments["image_grid_thw"]
    places: list[tuple[int, int]] = []
    rows, columns = IMAGE_GRID
    for place, kind in enumerate(prompt.kinds):
        if kind and prompt.kinds[place - 1]:
            continue
        start = max((max(pair) for pair in places), default=-1) + 1
        places.append((start, start))
        if kind:
            grid = [(row, column) for row in range(rows) for column in range(columns)]
            places += [(start + 1 + row, start + 1 + column) for row, column in grid]
    mask = arguments["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0).repeat(2, 1, 1)
    positions[:, 0] = torch.tensor(places).T
    return arguments | {"position_ids": positions}


def _omni(prompt: _Prompt, arguments: dict[str, Any]) -> dict[str, Any]:
    """It tells images by their tokens, and gives a second of video 25 positions."""
    del arguments["mm_token_type_ids"]
    return arguments | {"video_second_per_grid": torch.tensor([1.0])}


_OWN = {
    "glm_image": _glm_image,
    "minicpmv4_7": _minicpmv,
    "neomme": _neomme,
    "qwen2_5_omni_thinker": _omni,
    "qwen2_5_vl": lambda prompt, arguments: {
        **arguments,
        "second_per_grid_ts": torch.tensor([2.0]),
    },
    "qwen3_omni_moe_thinker": _omni,
}

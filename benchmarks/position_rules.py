"""Measure where each family places an image, a video and the text behind, as a Markdown table.

Run it as ``python benchmarks/position_rules.py``; ``docs/vision_language.md`` holds what it prints,
and the tests hold it against the installed transformers.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import zoo  # noqa: E402
from torch import Tensor  # noqa: E402

from hf_rope_ext.models.sites import read_sites  # noqa: E402
from hf_rope_ext.planning.request_length import position_rule  # noqa: E402
from hf_rope_ext.rotary.axes import axis_names  # noqa: E402
from hf_rope_ext.saving.loading import skeleton  # noqa: E402

MODEL_TYPES = (
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "ernie4_5_vl_moe",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "hunyuan_vl",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
)
HEADINGS = ("model types", "axes", "image", "text behind it", "video", "text behind it")
BEFORE, ROWS, COLUMNS, FRAMES = 3, 2, 4, 12
TEXT, START, IMAGE, VIDEO = 10, 5, 6, 7  # as `zoo` configures its models


def measure(model_type: str) -> tuple[str, ...]:
    """Return what the table says of a model type, its name left out."""
    model = skeleton(zoo.config(model_type))
    site = read_sites(model)[0]
    part = position_rule(model, site)
    axes = axis_names(site.rotary, site.label)
    image, behind_image = _image(part, axes)
    return ", ".join(axes), image, behind_image, *_video(part)


def table() -> str:
    """Return the table, model types that agree in one row."""
    rows = defaultdict(list)
    for model_type in MODEL_TYPES:
        rows[measure(model_type)].append(f"`{model_type}`")
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    lines += [f"| {' '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()]
    return "\n".join(lines)


def _image(part: Any, axes: tuple[str, ...]) -> tuple[str, str]:
    """Return how the axes of the second of two images count, and where text goes on."""
    grid = torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]] * 2)
    for row_ends in (False, True):
        columns = COLUMNS + row_ends
        span = [IMAGE] * (ROWS * columns + 2 * row_ends)
        ids = [*[TEXT] * BEFORE, *[START, *span, TEXT] * 2, TEXT]
        try:
            found = _positions(part, ids, {IMAGE: 1}, image_grid_thw=grid)
        except (RuntimeError, ValueError):
            continue
        break
    begin = len(ids) - 2 - len(span) + row_ends
    start = found[0, begin - 1 - row_ends] + 1  # where text would have gone on
    places = torch.arange(ROWS * columns)
    block = found[:, begin : begin + len(places)]
    row, column = places // columns, places % columns
    meanings = {
        "c": start + 0 * places,
        "c + row": start + row,
        "c + column": start + column,
        "row": row,
        "column": column,
        "number of the image": 1 + 0 * places,
        "c + token": start + row_ends + places,
    }
    names = [_name(values, meanings) for values in block]
    words = ", ".join(f"{axis} = {name}" for axis, name in zip(axes, names, strict=True))
    return words, _behind(found[:, -2] - start, len(span), int(block.max() - start) + 1)


def _video(part: Any) -> tuple[str, str]:
    """Return how time counts in a video with a second from grid to grid, and where text goes on."""
    grid = torch.tensor([[FRAMES, 2 * ROWS, 2 * COLUMNS]])
    frame = ROWS * COLUMNS
    for frames, spans in ((FRAMES, 1), (FRAMES // 2, 1), (1, FRAMES)):
        span = [START, *[VIDEO] * (frames * frame), TEXT]
        ids = [*[TEXT] * BEFORE, *span * spans, TEXT]
        try:
            found = _positions(part, ids, {VIDEO: 2}, video_grid_thw=grid)
        except (RuntimeError, TypeError, ValueError):
            continue
        break
    else:
        return "none", ""
    start = found[0, BEFORE] + 1
    block = found[:, BEFORE + 1 : BEFORE + 1 + frames * frame]
    behind = found[:, BEFORE + 1 + frames * frame] - start
    words = _behind(behind, frames * frame, int(block.max() - start) + 1)
    if spans > 1:
        return "frames apart, each placed as an image", words
    k = torch.arange(frames).repeat_interleave(frame)
    meanings = {f"t = c + {n} k" if n > 1 else "t = c + k": start + n * k for n in range(1, 101)}
    time = _name(block[0], meanings)
    return (time if frames == FRAMES else f"{time}, two grids merged"), words


def _positions(part: Any, ids: list[int], kinds: dict[int, int], **grids: Tensor) -> Tensor:
    """Return positions ``(axes, seq)`` as the family computes them."""
    tokens = torch.tensor([ids])
    known = part.get_rope_index.__code__.co_varnames
    given = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.tensor([[kinds.get(token, 0) for token in ids]]),
        "second_per_grid_ts": torch.tensor([1.0]),
        "second_per_grids": torch.tensor([1.0]),
        **grids,
    }
    given = {name: value for name, value in given.items() if name in known}
    for name in grids:
        if name not in given:
            raise TypeError(name)
    return part.get_rope_index(**given)[0][:, 0].long()  # type: ignore[no-any-return]


def _name(values: Tensor, meanings: dict[str, Tensor]) -> str:
    return next(name for name, meant in meanings.items() if torch.equal(values, meant))


def _behind(behind: Tensor, tokens: int, extent: int) -> str:
    assert (behind == behind[0]).all()  # text stands at one position on all axes
    meanings = {
        "c + max(rows, columns)": max(ROWS, COLUMNS),
        "largest + 1": extent,
        "c + tokens": tokens,
    }
    return next(name for name, meant in meanings.items() if int(behind[0]) == meant)


if __name__ == "__main__":
    print(table())

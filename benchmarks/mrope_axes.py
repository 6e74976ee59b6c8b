"""Scale a vision-language model by axis: what each way does to what t, h and w tell.

A tiny Qwen2.5-VL (`reader`) learns to read drawn videos of 8 scenes, one frame each (`scenes`).
Then, untuned, it reads

- **dense** videos: the same scenes, each held for 2, 4 and 8 frames;
- **long** videos: 2, 4 and 8 times as many scenes, asked about 8 of them;
- **large** frames: 2 and 4 times as many cells on a side;
- **kept** ones: videos of the trained size under a factor of 4;

with the frequencies of all axes scaled, with those of the grown axes alone, and with the positions
of visual tokens scaled instead. Dense and large favour interpolation by construction: what is asked
for stands at the trained share of the video. In long ones it stands at the trained distance.

Run it as ``python benchmarks/mrope_axes.py --seeds 0,1,2``; needs matplotlib and Pillow.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import reader
import scenes
import torch
from matplotlib.figure import Figure
from PIL import Image
from reader import Recipe
from recording import RESULTS, record
from scenes import Videos
from torch import Generator, Tensor, nn

from hf_rope_ext import RopeWarning, VisualPositions, patched

VIDEOS, AT_ONCE = 64, 16
BATCHES = [slice(start, start + AT_ONCE) for start in range(0, VIDEOS, AT_ONCE)]
SIZES = {"kept": (1,), "dense": (1, 2, 4, 8), "long": (2, 4, 8), "large": (2, 4)}
"""How many times the trained size, by condition."""

KEPT = 4


@dataclass(frozen=True)
class Setting:
    """How a model is trained and under which conditions it is tested.

    Attributes:
        recipe: Of the model.
        layout: Which pairs turn by which axis; the family's own, chunked, when not given.
        next_text: Where the text behind a video begins; the family's own rule, "spatial", when not
            given.
        conditions: Of the tests.
    """

    recipe: Recipe = field(default_factory=Recipe)
    layout: str | None = "interleaved"
    next_text: str | None = None
    conditions: tuple[str, ...] = ("kept", "dense", "long", "large")


SETTINGS = {
    "spatial": Setting(),
    "max": Setting(next_text="max", conditions=("kept", "dense", "long")),
    "max, theta 150": Setting(Recipe(theta=150.0), next_text="max", conditions=("dense",)),
    "stock layout": Setting(
        Recipe(theta=4.0, section=(4, 6, 6), steps=800), layout=None, conditions=("dense",)
    ),
}
"""A second theta, because a distance that was never trained can look like one that was, after
whole turns of a pair. Theta is low where the layout leaves height and width slow pairs alone."""

SHORT = {"beta_fast": 1.0, "beta_slow": 0.25}
"""YaRN's bounds for a length this short: by its own, 32 and 1, nearly all pairs are slow."""

WAYS: dict[str, tuple[str, str, dict[str, float]]] = {
    "none": ("none", "", {}),
    "linear, all axes": ("linear", "all", {}),
    "linear, grown axes": ("linear", "grown", {}),
    "ntk, all axes": ("ntk", "all", {}),
    "ntk, grown axes": ("ntk", "grown", {}),
    "yarn, all axes": ("yarn", "all", {}),
    "yarn, grown axes": ("yarn", "grown", {}),
    "yarn, grown axes, no temperature": ("yarn", "grown", {"attention_factor": 1.0}),
    "yarn (1, 1/4), all axes": ("yarn", "all", SHORT),
    "yarn (1, 1/4), grown axes": ("yarn", "grown", SHORT),
    "visual positions": ("none", "plain", {}),
    "visual positions, centred": ("none", "centred", {}),
    "frame times": ("none", "", {}),
}
"""Method, what is scaled, knobs. "frame times" scales nothing: the prompt says how long a frame
lasts, and the model counts seconds. Only dense videos have such times."""


def patch(
    model: nn.Module, setting: Setting, way: str, times: float, grown: str
) -> AbstractContextManager[nn.Module]:
    """Return the model patched for a block.

    Args:
        model: The model.
        setting: Whose layout and rule hold.
        way: One of WAYS.
        times: The factor.
        grown: The axes that have grown, letter by letter.
    """
    method, scope, knobs = WAYS[way]
    by_axis = dict.fromkeys(grown, times)
    scaled: dict[str, Any] = {"all": {"factor": times}, "grown": {"factor": by_axis}}.get(scope, {})
    visual = VisualPositions(
        factor=by_axis if scope in ("plain", "centred") else 1.0,
        centred=scope != "plain",
        next_text=setting.next_text,
    )
    return patched(
        model, method, mrope_layout=setting.layout, visual_positions=visual, **scaled, **knobs
    )


def grown_videos(condition: str, times: int, behind: bool, generator: Generator) -> Videos:
    """Return test videos.

    Args:
        condition: One of SIZES.
        times: The trained size.
        behind: Whether the question stands behind the last frame and not near the first. The 8
            scenes that long videos are asked for are those near the question.
        generator: Makes them the same every time.
    """
    if condition == "long":
        first = scenes.SCENES * (times - 1) if behind else 0
        return scenes.videos(generator, VIDEOS, scenes=scenes.SCENES * times, first=first)
    if condition == "large":
        return scenes.videos(generator, VIDEOS, zoom=times)
    return scenes.videos(generator, VIDEOS, hold=times)


def accuracy(logits: Tensor, videos: Videos) -> dict[str, float]:
    """Return the share of right answers by axis, the most probable token counting as the answer."""
    right = (logits.argmax(-1) == videos.answers).float().mean(0)
    return {axis: right[asked].mean().item() for axis, asked in scenes.AXES.items()}


@torch.no_grad()
def measure(model: nn.Module, setting: Setting, seed: int) -> dict[str, Any]:
    """Return accuracy by condition, way, size and axis, and how far the two routes differ.

    Questions are asked in one pass over what the tower sees; the first video is also asked one by
    one, its pixels in the prompt.
    """
    found: dict[str, Any] = {}
    difference = 0.0
    for condition in setting.conditions:
        grown = "hw" if condition == "large" else "t"
        for times in SIZES[condition]:
            generator = Generator().manual_seed(1_000_000 + 1000 * seed + times)
            videos = grown_videos(condition, times, setting.next_text == "max", generator)
            pixels = scenes.patches(scenes.draw(videos.glyphs, generator))
            seen = reader.features(model, pixels, videos.grid)
            one = pixels[: len(pixels) // VIDEOS]
            for way in WAYS:
                if way == "frame times" and condition != "dense":
                    continue
                seconds = 1 / times if way == "frame times" else 1.0
                with patch(model, setting, way, KEPT if condition == "kept" else times, grown):
                    logits = torch.cat(
                        [reader.read(model, videos[some], seen[some], seconds) for some in BATCHES]
                    )
                    if times <= 2:
                        alone = reader.one_by_one(model, videos[:1], one, seconds)
                        difference = max(difference, float((logits[:1] - alone).abs().max()))
                by_size = found.setdefault(condition, {}).setdefault(way, {})
                by_size[str(times)] = accuracy(logits, videos)
    assert difference < 1e-3, f"asked in one pass and one by one, logits differ by {difference}"
    return {"accuracy": found, "largest difference of the two routes": difference}


def run(setting: Setting, seed: int) -> dict[str, Any]:
    """Train a model and measure it."""
    start = time.process_time()
    model = reader.build(setting.recipe, seed)
    with patch(model, setting, "none", 1, ""):
        reader.train(model, setting.recipe.steps, seed)
    trained = time.process_time()
    measured = measure(model, setting, seed)
    seconds = {"training": trained - start, "measuring": time.process_time() - trained}
    return {**measured, "processor seconds": seconds}


def over_seeds(runs: list[Any]) -> Any:
    """Return mean and standard deviation of nested shares, in per cent."""
    if isinstance(runs[0], dict):
        return {key: over_seeds([one[key] for one in runs]) for key in runs[0]}
    values = [round(100 * value, 2) for value in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 2), "stdev": round(spread, 2), "runs": values}


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a heat map for each condition: accuracy by way, axis and size."""
    wanted = [
        ("spatial", "dense"),
        ("spatial", "long"),
        ("spatial", "large"),
        ("max", "dense"),
        ("max", "long"),
        ("stock layout", "dense"),
    ]
    figure = Figure(figsize=(16, 9), layout="constrained")
    image: Any = None
    panels = figure.subplots(2, 3, sharey=True).flat
    for panel, (setting, condition) in zip(panels, wanted, strict=True):
        ways, sizes = found[setting][condition], SIZES[condition]
        columns = [(axis, str(size)) for axis in scenes.AXES for size in sizes]
        grid = [
            [ways[way][size][axis]["mean"] if way in ways else math.nan for axis, size in columns]
            for way in WAYS
        ]
        image = panel.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                text = "-" if math.isnan(value) else f"{value:.0f}"
                color = "white" if value < 15 or value > 90 else "black"
                panel.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        for axis in range(1, len(scenes.AXES)):
            panel.axvline(axis * len(sizes) - 0.5, color="black")
        panel.set_xticks(range(len(columns)), [f"{axis}\n{size}x" for axis, size in columns])
        panel.set_yticks(range(len(WAYS)), list(WAYS))
        panel.set_title(f"{setting}: {condition}")
    figure.suptitle(
        "right answers in % to what time (t), height (h) and width (w) tell, by size over trained; "
        f"chance {100 / scenes.CHOICES}"
    )
    figure.colorbar(image, ax=figure.axes, shrink=0.5)
    figure.savefig(path, dpi=100)


def picture(path: Path) -> None:
    """Draw the frames of one video, side by side."""
    generator = Generator().manual_seed(3)
    frames = scenes.draw(scenes.videos(generator, 1).glyphs, generator)[0]
    strip = torch.cat(list(nn.functional.pad(frames, (2, 2, 2, 2), value=128)), -1)
    image = Image.fromarray(strip.permute(1, 2, 0).numpy())
    image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Measure everything, keeping what is done, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", type=Path, help="directory of finished runs, to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # each patch would say that the layout has to be trained, and what the vendor says of YaRN
    warnings.simplefilter("ignore", RopeWarning)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    keep = arguments.keep or Path(tempfile.mkdtemp())
    keep.mkdir(exist_ok=True)
    runs: dict[str, list[Any]] = {name: [] for name in SETTINGS}
    for name, setting in SETTINGS.items():
        for seed in seeds:
            path = keep / f"{name} {seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(setting, seed)))
            runs[name].append(json.loads(path.read_text()))
            print(name, seed, runs[name][-1]["processor seconds"], flush=True)
    route = "largest difference of the two routes"
    results = {
        "accuracy": {name: over_seeds([one["accuracy"] for one in runs[name]]) for name in runs},
        route: max(one[route] for many in runs.values() for one in many),
        "processor seconds": {
            name: [one["processor seconds"] for one in runs[name]] for name in runs
        },
    }
    print(
        record(
            "mrope_axes",
            results,
            seeds=seeds,
            videos=VIDEOS,
            kept=KEPT,
            chance=100 / scenes.CHOICES,
            settings={name: asdict(setting) for name, setting in SETTINGS.items()},
        )
    )
    plot(results["accuracy"], RESULTS / "mrope_axes.png")
    picture(RESULTS / "mrope_axes_video.png")


if __name__ == "__main__":
    main()

"""Scale a vision-language model by axis: what each way does to what t, h and w tell.

A tiny Qwen2.5-VL, drawn frames through its vision tower, learns to read 8 scenes of one frame each
(`scenes`); then, untuned, it reads

- **dense** videos, the same scenes held for 2, 4 and 8 frames,
- **long** videos of 2, 4 and 8 times as many scenes, asked about 8 of them,
- **large** frames, 2 and 4 times as many cells on a side,

with all frequencies scaled, with those of the grown axes alone, and with the positions of the
visual tokens scaled instead. Dense and large favour interpolation by construction: the answer is
at the trained fraction of the video. In long videos it is at the trained distance.

Run it as ``python benchmarks/mrope_axes.py --seeds 0,1,2``.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import scenes
import torch
from recording import RESULTS, record
from scenes import QUESTIONS, VIDEO_PAD, Videos
from torch import Generator, Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_rope_ext import RopeWarning, VisualPositions, patched

THETA, SECTION, LAYOUT = 100.0, [6, 5, 5], "interleaved"
TRAINED = 2 + scenes.SCENES + 1
"""Positions of a trained prompt, where the question stands behind the last frame."""

TOWER_STEPS, TOWER_RATE = 100, 3e-3
STEPS, WARM_UP, BATCH, RATE = 400, 30, 16, 3e-3
VIDEOS, AT_ONCE = 64, 16

RULES = {"spatial": None, "max": "max"}
"""Where the text behind a video begins: by the model's own rule, or behind the largest position."""

CONDITIONS = {"kept": (1,), "dense": (2, 4, 8), "long": (2, 4, 8), "large": (2, 4)}
"""How many times the trained size; "kept" is the trained size under a factor of KEPT."""

KEPT = 4
SHORT = {"beta_fast": 1.0, "beta_slow": 0.25}
"""YaRN's bounds for so short a length: under its own, (32, 1), all pairs but the first are slow."""

WAYS: dict[str, tuple[str, str, dict[str, float]]] = {
    "none": ("none", "", {}),
    "linear, all axes": ("linear", "all", {}),
    "linear, grown axes": ("linear", "grown", {}),
    "ntk, all axes": ("ntk", "all", {}),
    "ntk, grown axes": ("ntk", "grown", {}),
    "yarn, all axes": ("yarn", "all", {}),
    "yarn, grown axes": ("yarn", "grown", {}),
    "yarn (1, 1/4), all axes": ("yarn", "all", SHORT),
    "yarn (1, 1/4), grown axes": ("yarn", "grown", SHORT),
    "positions": ("none", "plain", {}),
    "positions, centred": ("none", "centred", {}),
    "frame times": ("none", "", {}),
}
"""Method, what is scaled, knobs. "frame times" scales nothing: the prompt says how long a frame is,
and the model counts seconds. Only dense videos have such times."""


def build(seed: int) -> nn.Module:
    """Return an untrained model.

    The tower's attention windows are one cell, so no feature knows where its cell is: only M-RoPE
    says so. Keys have biases to begin with, as those of trained models of this family do: attention
    by position alone needs something that all keys share.
    """
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": scenes.VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": TRAINED,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": THETA,
                "mrope_section": SECTION,
            },
            "bos_token_id": scenes.START,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": scenes.PATCH,
            "spatial_merge_size": scenes.MERGE,
            "temporal_patch_size": scenes.TEMPORAL,
            "tokens_per_second": 1,
            "window_size": scenes.CELL,
            "fullatt_block_indexes": [],
        },
        image_token_id=scenes.IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=scenes.VISION_START,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, weight in model.model.visual.named_parameters():
        if "weight" in name and weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    language = model.model.language_model
    for layer in language.layers:
        attention = layer.self_attn
        for part in (attention.o_proj, *layer.mlp.children()):
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.08)
        for part, std in ((attention.q_proj, 0.2), (attention.k_proj, 0.2)):
            nn.init.normal_(part.weight, std=std)
        nn.init.normal_(attention.k_proj.bias)
        nn.init.normal_(attention.v_proj.weight, std=0.125)
    nn.init.normal_(language.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.08)
    return model


def prompt(videos: Videos, question: int = 0, seconds: float = 1.0) -> dict[str, Tensor]:
    """Return a prompt that asks each video one question, as a processor would make it.

    Args:
        videos: The videos.
        question: Index of the question.
        seconds: That a frame is said to last.
    """
    pads = [VIDEO_PAD] * videos.glyphs[0].numel()
    words = [scenes.START, scenes.VISION_START, *pads, scenes.FIRST_QUESTION + question]
    ids = torch.tensor([words] * len(videos))
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == VIDEO_PAD).int(),
        "video_grid_thw": videos.grid,
        "second_per_grid_ts": torch.full((len(videos),), seconds),
    }


def features(model: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    """Return what the tower makes of pixels, ``(videos, cells, hidden)``."""
    return torch.stack(model.model.get_video_features(pixels, grid, return_dict=True).pooler_output)


def read(model: nn.Module, videos: Videos, seen: Tensor, seconds: float = 1.0) -> Tensor:
    """Return the logits of all questions in one pass, ``(batch, questions, vocabulary)``.

    All questions stand at the position of one, blind to each other: each sees what it would see
    alone. Positions are those the model computes for a prompt with one question.
    """
    words = prompt(videos, seconds=seconds)
    asked = {name: words[name][:1] for name in words}
    positions = model.model.get_rope_index(**asked)[0]
    positions = torch.cat([positions[..., :-1], positions[..., -1:].expand(-1, -1, QUESTIONS)], -1)
    questions = scenes.FIRST_QUESTION + torch.arange(QUESTIONS).expand(len(videos), -1)
    ids = torch.cat([words["input_ids"][:, :-1], questions], 1)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask[-QUESTIONS:, -QUESTIONS:] = torch.eye(QUESTIONS, dtype=torch.bool)
    return model(
        input_ids=ids,
        attention_mask=mask.expand(len(videos), 1, -1, -1),
        position_ids=positions.expand(-1, len(videos), -1),
        mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=seen.unbind())},
        logits_to_keep=QUESTIONS,
        use_cache=False,
    ).logits


def one_by_one(model: nn.Module, videos: Videos, pixels: Tensor, seconds: float = 1.0) -> Tensor:
    """Return what `read` returns, with one prompt for each question and the pixels in it."""
    found = [
        model(**prompt(videos, question, seconds), pixel_values_videos=pixels).logits[:, -1]
        for question in range(QUESTIONS)
    ]
    return torch.stack(found, 1)


def patch(model: nn.Module, way: str, rule: str, times: int, grown: str) -> AbstractContextManager:
    """Return the model patched in a way, for a block.

    Args:
        model: The model.
        way: One of WAYS.
        rule: One of RULES.
        times: The factor.
        grown: The axes that have grown, letter by letter.
    """
    method, scope, knobs = WAYS[way]
    by_axis = dict.fromkeys(grown, float(times))
    scaled: dict[str, Any] = {"all": {"factor": times}, "grown": {"factor": by_axis}}
    visual = VisualPositions(
        factor=by_axis if scope in ("plain", "centred") else 1.0,
        centred=scope != "plain",
        next_text=RULES[rule],
    )
    arguments = {**scaled.get(scope, {}), **knobs, "visual_positions": visual}
    return patched(model, method, mrope_layout=LAYOUT, **arguments)


def teach_glyphs(model: nn.Module) -> Tensor:
    """Train the tower to tell glyphs apart; return what it sees, ``(glyphs, places, hidden)``."""
    cells = scenes.atlas()
    count, places = cells.shape[:2]
    pixels = scenes.patches(cells.flatten(0, 1)[:, None])
    grid = torch.tensor([[1, scenes.MERGE, scenes.MERGE]] * count * places)
    labels = torch.arange(count).repeat_interleave(places)
    head = nn.Linear(model.config.text_config.hidden_size, count)
    tower = model.model.visual
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=TOWER_RATE)
    for _ in range(TOWER_STEPS):
        logits = head(features(model, pixels, grid)[:, 0])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    tower.requires_grad_(False)
    return features(model, pixels, grid).view(count, places, -1)


def share_of_rate(step: int) -> float:
    """Return the learning rate of a step over RATE: warm-up, constant, linear to 2 %."""
    late = max(0.0, (step - 0.6 * STEPS) / (0.4 * STEPS))
    return min(1.0, (step + 1) / WARM_UP) * (1 - 0.98 * late)


def train(model: nn.Module, seed: int) -> None:
    """Train the tower, then all the rest on what the tower sees of each glyph."""
    seen = teach_glyphs(model)
    generator = Generator().manual_seed(1000 + seed)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    for _ in range(STEPS):
        videos = scenes.videos(generator, BATCH)
        places = scenes.places(videos.glyphs, generator)
        logits = read(model, videos, seen[videos.glyphs, places].flatten(1, 3))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), videos.answers.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def grown_videos(condition: str, rule: str, times: int, generator: Generator) -> Videos:
    """Return test videos.

    In long ones the 8 scenes asked for are those at the trained distance from the question: the
    first, where text goes on near a video's beginning, or the last, where it goes on behind it.
    """
    if condition == "long":
        first = scenes.SCENES * (times - 1) if rule == "max" else 0
        return scenes.videos(generator, VIDEOS, scenes=scenes.SCENES * times, first=first)
    return scenes.videos(generator, VIDEOS, **{"large": {"zoom": times}}.get(condition, {"hold": times}))


def part(videos: Videos, start: int, end: int) -> Videos:
    """Return some of the videos."""
    return Videos(videos.glyphs[start:end], videos.answers[start:end])


def ways(condition: str) -> Iterator[str]:
    """Yield the ways that mean something under a condition."""
    return (way for way in WAYS if way != "frame times" or condition == "dense")


@torch.no_grad()
def measure(model: nn.Module, rule: str, seed: int) -> dict[str, Any]:
    """Return accuracy by condition, way, size and axis, and how far the two routes differ."""
    found: dict[str, Any] = {}
    difference = 0.0
    for number, (condition, sizes) in enumerate(CONDITIONS.items()):
        if condition == "large" and rule == "max":
            continue
        grown = "hw" if condition == "large" else "t"
        for times in sizes:
            generator = Generator().manual_seed(10_000 + 100 * seed + 10 * number + times)
            videos = grown_videos(condition, rule, times, generator)
            pixels = scenes.patches(scenes.draw(videos.glyphs, generator)).unflatten(0, (VIDEOS, -1))
            seen = features(model, pixels.flatten(0, 1), videos.grid)
            for way in ways(condition):
                seconds = 1 / times if way == "frame times" else 1.0
                factor = KEPT if condition == "kept" else times
                with patch(model, way, rule, factor, grown):
                    logits = torch.cat(
                        [
                            read(model, part(videos, at, at + AT_ONCE), seen[at : at + AT_ONCE], seconds)
                            for at in range(0, VIDEOS, AT_ONCE)
                        ]
                    )
                    if times <= 2:
                        alone = one_by_one(model, part(videos, 0, 1), pixels[0], seconds)
                        difference = max(difference, float((logits[:1] - alone).abs().max()))
                right = (logits.argmax(-1) == videos.answers).float().mean(0)
                found.setdefault(condition, {}).setdefault(way, {})[str(times)] = {
                    axis: right[asked].mean().item() for axis, asked in scenes.AXES.items()
                }
    assert difference < 1e-3, f"all questions at once differ by {difference} from one by one"
    return {"accuracy": found, "largest difference of one pass": difference}


def run(rule: str, seed: int) -> dict[str, Any]:
    """Train a model under a rule and measure it."""
    start = time.process_time()
    model = build(seed)
    with patch(model, "none", rule, 1, ""):
        train(model, seed)
    trained = time.process_time()
    measured = measure(model, rule, seed)
    seconds = {"training": trained - start, "measuring": time.process_time() - trained}
    return {**measured, "processor seconds": seconds}


def over_seeds(runs: list[Any]) -> Any:
    """Return mean and standard deviation of nested numbers, in per cent."""
    if isinstance(runs[0], dict):
        return {key: over_seeds([one[key] for one in runs]) for key in runs[0]}
    values = [100 * value for value in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "stdev": spread, "runs": values}


def main() -> None:
    """Measure everything, keeping what is done, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.mkdtemp()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # each patch says again that the layout has to be trained, and what the vendor says of YaRN
    warnings.simplefilter("ignore", RopeWarning)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.keep.mkdir(exist_ok=True)
    cells: dict[str, list[Any]] = {}
    for rule in RULES:
        for seed in seeds:
            path = arguments.keep / f"{rule} {seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(rule, seed)))
            cells.setdefault(rule, []).append(json.loads(path.read_text()))
            print(rule, seed, cells[rule][-1]["processor seconds"], flush=True)
    accuracy = {rule: over_seeds([one["accuracy"] for one in runs]) for rule, runs in cells.items()}
    costs = {rule: [one["processor seconds"] for one in runs] for rule, runs in cells.items()}
    furthest = max(one["largest difference of one pass"] for runs in cells.values() for one in runs)
    print(
        record(
            "mrope_axes",
            {
                "accuracy": accuracy,
                "largest difference of one pass": furthest,
                "processor seconds": costs,
            },
            seeds=seeds,
            videos=VIDEOS,
            theta=THETA,
            section=SECTION,
            layout=LAYOUT,
            trained_positions=TRAINED,
            steps=STEPS,
            batch=BATCH,
            learning_rate=RATE,
            factor_kept=KEPT,
            chance=100 / scenes.CHOICES,
        )
    )


if __name__ == "__main__":
    main()

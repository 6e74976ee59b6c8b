"""Requests are as long as the positions that reach the rotary embedding."""

import ast
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
import zoo_images
from conftest import tiny_llama
from decoding import CACHE
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from hf_rope_ext import (
    RopeError,
    Video,
    VisualPositions,
    patch_model,
    request_length,
    unpatch_model,
    visual_length,
)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import position_rules  # noqa: E402

from hf_rope_ext.models.sites import read_sites  # noqa: E402
from hf_rope_ext.planning.request_length import position_rule  # noqa: E402
from hf_rope_ext.planning.visual_length import _MadeUp  # noqa: E402
from hf_rope_ext.saving.loading import skeleton  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")


def positions_of(model, inputs):
    """The positions a forward hands to the text model's rotary embedding, padding left out."""
    seen = []
    paths = [path for path, _ in model.named_modules() if path.endswith("rotary_emb")]
    text = [path for path in paths if "vis" not in path and "audio" not in path]

    def note(module, arguments, keywords):
        found = keywords.get("position_ids", arguments[1] if len(arguments) > 1 else None)
        seen.append(found)

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True) for path in text
    ]
    zoo.run(model, **inputs)
    for hook in hooks:
        hook.remove()
    kept = inputs["attention_mask"].bool()
    return torch.stack([row[kept] for row in seen[0].expand(-1, *kept.shape)])


def state(model):
    """What the parts that compute positions hold, by identity."""
    return [
        {name: id(value) for name, value in vars(part).items()}
        for part in model.modules()
        if hasattr(part, "get_rope_index")
    ]


@pytest.mark.parametrize("model_type", sorted(zoo_images.FAMILIES))
def test_every_axis_is_measured_as_the_rotary_embedding_sees_it(model_type):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model, padded=True)
    before = state(model)

    found = request_length(model, **BatchFeature(inputs))

    assert state(model) == before
    expected = positions_of(model, inputs)
    assert found.tokens == int(inputs["attention_mask"].sum(dim=1).max())
    assert list(found.largest.values()) == expected.amax(dim=1).tolist()
    assert found.positions == int(expected.max()) + 1
    assert found.trained == zoo.TRAINED


def test_what_an_earlier_request_left_on_the_model_is_not_used():
    model = zoo.build("qwen2_5_vl")
    inputs = zoo_images.image_inputs(model)
    expected = request_length(model, **inputs)

    zoo.run(model, **zoo_images.image_inputs(model, words=7))
    left = model.model.rope_deltas

    assert request_length(model, **inputs) == expected
    assert model.model.rope_deltas is left
    assert request_length(model, **zoo.inputs(model, length=100)).positions == 100


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker"])
def test_tokens_to_be_generated_take_a_position_each(model_type):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model, words=1)
    seen = []
    text = model.get_submodule(read_sites(model)[0].path)
    hook = text.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(
            keywords.get("position_ids", arguments[-1])[..., -1].flatten().tolist()
        ),
        with_kwargs=True,
    )

    model.generate(
        **inputs, max_new_tokens=50, min_new_tokens=50, suppress_tokens=zoo_images.SPECIAL
    )
    hook.remove()

    # the last of them is not read
    found = request_length(model, **inputs, max_new_tokens=49)
    assert list(found.largest.values()) == seen[-1] == [seen[0][1] + 49] * 3
    few = request_length(model, **inputs, max_new_tokens=4)
    assert few.positions == max(max(seen[4]) + 1, request_length(model, **inputs).positions)
    assert few.tokens == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("method", ["generate", "by hand"])
def test_what_is_written_behind_a_long_video_begins_where_the_page_says(method):
    model = zoo.build("qwen2_5_vl")
    inputs = zoo_images.image_inputs(model, words=1)
    seen = []
    rotary = model.get_submodule(read_sites(model)[0].path)
    rotary.register_forward_pre_hook(lambda module, given: seen.append(int(given[1][0, 0, -1])))

    if method == "generate":
        model.generate(**inputs, max_new_tokens=2, suppress_tokens=zoo_images.SPECIAL)
    else:
        cache = model(**inputs)[CACHE]
        model(torch.tensor([[20]]), **{CACHE: cache})

    assert seen == [19, 20 if method == "generate" else 39]


def test_a_patched_model_is_measured_by_its_own_rule_for_visual_tokens():
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    stock = request_length(model, **inputs)

    patch_model(
        model, "yarn", factor=4, visual_positions=VisualPositions(factor=0.25, next_text="max")
    )
    found = request_length(model, **inputs)

    expected = positions_of(model, inputs)
    assert list(found.largest.values()) == expected.amax(dim=1).long().tolist()
    assert found.positions > stock.positions
    unpatch_model(model)
    assert request_length(model, **inputs) == stock


def test_positions_that_are_given_count_without_padding_and_running_rows():
    model = zoo.build("qwen3_vl")
    ids = torch.full((2, 3), 20)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    axes = torch.tensor([[[900, 5, 6], [1, 2, 3]], [[9, 7, 1], [8, 0, 0]], [[9, 2, 2], [0, 0, 4]]])
    running = torch.full((1, 2, 3), 70)

    three = request_length(model, input_ids=ids, attention_mask=mask, position_ids=axes)
    four = request_length(
        model, input_ids=ids, attention_mask=mask, position_ids=torch.cat((running, axes))
    )
    flat = request_length(model, input_ids=ids, attention_mask=mask, position_ids=axes[0])

    assert three == four
    assert three.largest == {"t": 6, "h": 8, "w": 4}
    assert (three.positions, three.tokens) == (9, 3)
    assert flat.largest == {"t": 6, "h": 6, "w": 6}
    llama = request_length(tiny_llama(), input_ids=ids, position_ids=axes[0])
    assert (llama.positions, llama.largest) == (901, {})


def test_factors_are_of_the_trained_length_and_told_in_words():
    model = zoo.build("qwen2_vl")
    ids = torch.full((1, 2), 20)
    positions = torch.tensor([[[0, 127]], [[0, 95]], [[0, 5]]])

    found = request_length(model, input_ids=ids, position_ids=positions)

    assert found.factor == 2.0
    assert found.factors == {"t": 2.0, "h": 1.5, "w": 1.0}
    assert str(found) == (
        "2 tokens, 128 positions (t up to 127, h up to 95, w up to 5), 64 trained: factor 2"
    )
    assert found.to_dict()["factors"] == found.factors
    patch_model(model, "yarn", factor=found.factors)
    linear = tiny_llama({"rope_type": "linear", "factor": 2.0})
    unknown = request_length(linear, input_ids=ids)
    assert "the trained length is not in the config" in str(unknown)
    with pytest.raises(RopeError, match="original_max_position_embeddings"):
        unknown.factor  # noqa: B018
    assert "fits" in str(request_length(tiny_llama(), input_ids=ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "must be a tensor of shape"),
        ({"input_ids": [[1, 2]]}, "return_tensors='pt'"),
        ({"input_ids": torch.tensor([1, 2])}, "must be a tensor of shape"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "attention_mask must have the shape"),
        ({"mm_token_type_ids": None}, "no mm_token_type_ids"),
        (
            {"image_grid_thw": torch.tensor([[1, 4, 4]])},
            "stands for 4 tokens of 2 x 2 patches, but",
        ),
        ({"image_grid_thw": torch.tensor([[1, 4, 8]] * 2)}, "stands for 16 tokens .* have 8;"),
        ({"video_grid_thw": torch.tensor([[2, 8, 4]])}, "video_grid_thw .* stands for 16 tokens"),
        ({"video_grid_thw": torch.tensor([[1, 16, 32]])}, "128 tokens of .* have 32"),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_wrong_inputs_are_refused(model_type, change, message):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model) | change

    with pytest.raises(RopeError, match=message):
        request_length(model, **inputs)


def test_grids_in_the_wrong_order_are_refused_by_the_rule_itself():
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    inputs["mm_token_type_ids"][0, 6] = 0  # cuts the image in two
    inputs["mm_token_type_ids"][0, 2] = 1

    with pytest.raises(RopeError, match=r"Qwen2VLModel cannot place .* \(StopIteration"):
        request_length(model, **inputs)


@pytest.mark.parametrize("model_type", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_an_omni_models_inputs_are_taken_by_the_processors_names(model_type):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model)
    found = request_length(model, **inputs)

    slower = request_length(model, **{**inputs, "video_second_per_grid": [2.0]})

    assert slower.positions == found.positions + 25 * (zoo_images.FRAMES - 1)
    with pytest.raises(RopeError, match="cannot place these images and videos"):
        request_length(model, **{**inputs, "video_second_per_grid": None})
    with pytest.raises(RopeError, match="but the ids have 8"):
        request_length(model, **{**inputs, "image_grid_thw": torch.tensor([[1, 8, 8]])})


@pytest.mark.parametrize(
    "heard", [{"feature_attention_mask": torch.ones(1, 16).long()}, {"audio_feature_lengths": [16]}]
)
def test_audio_takes_as_many_positions_as_tokens(heard):
    model = zoo.build("qwen2_5_omni_thinker")
    start, audio = model.config.audio_start_token_id, model.config.audio_token_id
    ids = [20, start, *[audio] * 4, 20, 5, *[6] * 8, 9, 20]  # 16 frames of sound are 4 tokens

    found = request_length(
        model, input_ids=torch.tensor([ids]), image_grid_thw=torch.tensor([[1, 4, 8]]), **heard
    )

    assert found.positions == len(ids) - 8 + 4


def test_hunyuans_images_may_lack_their_two_more_tokens():
    model = zoo.build("hunyuan_vl")
    grid = torch.tensor([[1, 4, 8]])  # 2 rows of 4 tokens and an end
    for tokens in (10, 12):
        kinds = torch.tensor([[0, *[1] * tokens, 0]])
        found = request_length(
            model, input_ids=kinds + 5, mm_token_type_ids=kinds, image_grid_thw=grid
        )
        assert found.positions == found.tokens == tokens + 2
    kinds = torch.tensor([[0, *[1] * 11, 0]])
    with pytest.raises(RopeError, match="HunYuanVLModel cannot place"):
        request_length(model, input_ids=kinds + 5, mm_token_type_ids=kinds, image_grid_thw=grid)


def test_the_documented_rules_are_those_of_the_installed_families():
    page = (ROOT / "docs" / "vision_language.md").read_text(encoding="utf-8")

    assert position_rules.table() in page
    assert {f"`{name}`" for name in zoo_images.FAMILIES} <= set(page.split())


IMAGES = [(1, 8, 12), (1, 4, 4)]


def by_hand(text, images, frames, rows, columns, *, step=1, behind="spatial", times=()):
    """Tokens and largest t, h, w of text, images and a video, one token after the other."""
    places = [(position,) * 3 for position in range(text)]

    def word():
        return (max(places[-1]) + 1,) * 3 if behind_block is None else (behind_block,) * 3

    behind_block = None
    blocks = [(1, height // 2, width // 2) for _, height, width in images]
    blocks += [(1, rows, columns)] * frames if times else [(frames, rows, columns)] * bool(frames)
    for number, (depth, height, width) in enumerate(blocks):
        for _ in range(times[number - len(images)] if times and number >= len(images) else 0):
            places.append(word())
            behind_block = None
        places.append(word())
        start = places[-1][0] + 1
        every = itertools.product(range(depth), range(height), range(width))
        pace = step if number >= len(images) else 1
        block = [(start + k * pace, start + row, start + column) for k, row, column in every]
        places += block
        largest = max(map(max, block))
        behind_block = largest + 1 if behind == "max" else start + max(height, width)
        places.append(word())
        behind_block = None
    return len(places), dict(zip("thw", map(max, zip(*places, strict=True)), strict=True))


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("qwen2_vl", {}),
        ("qwen2_5_vl", {"step": 4}),
        ("qwen2_5_omni", {"step": 25, "behind": "max"}),
        ("qwen3_omni_moe_thinker", {"step": 25, "behind": "max"}),
        # "<0.0 seconds>" to "<5.0 seconds>"
        ("qwen3_vl", {"times": (6,) * 6}),
        ("qwen3_5", {"times": (6,) * 6}),
        ("qwen4_exp", {"times": (6,) * 6}),
        ("glm4v_moe", {"times": (6,) * 6}),
        ("cohere_compass", {"times": (6,) * 6}),
        ("paddleocr_vl", {}),
    ],
)
def test_a_request_is_measured_from_sizes_alone(model_type, rule):
    config = zoo.config(model_type)

    found = visual_length(config, images=IMAGES, videos=[Video((6, 8, 4))], text=10)
    text = visual_length(config, text=10)
    images = visual_length(config, images=IMAGES, text=10)

    assert (found.tokens, dict(found.largest)) == by_hand(10, IMAGES, 6, 4, 2, **rule)
    assert (images.tokens, dict(images.largest)) == by_hand(10, IMAGES, 0, 0, 0)
    assert (text.tokens, text.positions) == (10, 10)
    assert found.positions == max(found.largest.values()) + 1


@pytest.mark.parametrize(("fps", "step"), [(4, 2), (0.5, 16), (3, 4 * 2 / 3)])
def test_frames_further_apart_take_more_positions(fps, step):
    found = visual_length(zoo.config("qwen2_5_vl"), videos=[Video((6, 8, 4), fps=fps)])

    assert found.largest["t"] == 1 + int(5 * step)


def test_frames_that_are_merged_and_rows_that_end_are_counted():
    ernie = visual_length(zoo.config("ernie4_5_vl_moe"), videos=[Video((6, 8, 4))])
    hunyuan = visual_length(zoo.config("hunyuan_vl"), images=[(1, 8, 12)], text=3)

    assert ernie.tokens == 1 + 3 * 4 * 2 + 1
    assert hunyuan.tokens == hunyuan.positions == 3 + 1 + 4 * 7 + 2 + 1
    assert hunyuan.largest.keys() == {"position", "w", "h", "image"}


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl"])
def test_no_order_of_text_images_and_video_reaches_further(model_type):
    config = zoo.config(model_type)
    model = skeleton(config)
    parts = {"text": 30, "image": (1, 12, 8), "video": (20, 4, 4)}
    apart = read_sites(model)[0].family.frames_apart
    reached = []
    for order in itertools.permutations(parts):
        request = _MadeUp(position_rule(model, read_sites(model)[0]).config, apart)
        for part in order:
            more = (2.0,) if part == "video" else ()
            getattr(request, f"add_{part}")(parts[part], *more)
        reached.append(request_length(model, **request.inputs()).positions)

    found = visual_length(model, images=[parts["image"]], videos=[Video(parts["video"])], text=30)

    assert found.positions == max(reached)
    assert (max(reached) > min(reached)) == (model_type == "qwen2_5_vl")  # text overlaps a video


@pytest.mark.parametrize("size", [(640, 360), (33, 500), (2000, 1500), (20, 20)])
@pytest.mark.parametrize(
    ("model_type", "processor"),
    [
        ("qwen2_5_vl", Qwen2VLImageProcessorPil(patch_size=16, max_pixels=640 * 480)),
        ("glm4v", Glm4vImageProcessorPil(patch_size=16)),
    ],
)
def test_pixels_become_patches_as_the_processor_beside_the_config_has_it(
    model_type, processor, size, tmp_path
):
    zoo.config(model_type).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    grid = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]

    found = visual_length(tmp_path, images=[size] * 2)

    expected = visual_length(str(tmp_path), images=[tuple(grid[0].tolist())] * 2)
    assert found == expected
    assert not found.assumed


def smart_resize(module):
    """A video processor's own function, out of a file that needs torchvision to be imported."""
    path = Path(transformers.__file__).parent / "models" / module
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "smart_resize"]
    names = {"math": math}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names["smart_resize"]


@pytest.mark.parametrize("frames", [2, 5, 64])
@pytest.mark.parametrize("name", ["video_preprocessor_config", "processor_config"])
@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("qwen2_5_vl", "qwen2_vl/video_processing_qwen2_vl.py"),
        ("qwen3_vl", "qwen3_vl/video_processing_qwen3_vl.py"),
        ("glm4v", "glm4v/video_processing_glm4v.py"),
        ("cohere_compass", "cohere_compass/video_processing_cohere_compass.py"),
    ],
)
def test_frames_become_patches_within_the_limits_of_the_video_processor(
    model_type, module, name, frames, tmp_path
):
    config = zoo.config(model_type)
    config.save_pretrained(tmp_path)
    settings = {"size": {"shortest_edge": 4096, "longest_edge": 500_000}}
    if name == "processor_config":
        settings = {"video_processor": settings}
    (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    counted = (frames,) if model_type != "qwen2_5_vl" else ()
    limits = {"factor": 32, "min_pixels": 4096, "max_pixels": 500_000}
    height, width = smart_resize(module)(*counted, 720, 1280, **limits)

    found = visual_length(tmp_path, videos=[Video((1280, 720), frames)])

    grid = (-(-frames // 2), height // 16, width // 16)
    assert found == visual_length(tmp_path, videos=[Video(grid)])


def test_what_is_not_known_is_said():
    config = zoo.config("qwen3_vl")

    found = visual_length(config, images=[(1000, 50)], videos=[Video((640, 360), 3)])

    assert (
        found.tokens
        == visual_length(config, images=[(1, 4, 62)], videos=[Video((2, 22, 40))]).tokens
    )
    assert visual_length(config, images=[(10, 10)]).tokens == 1 + 2
    assert len(found.assumed) == 3
    assert "images: sides rounded to multiples of 32 pixels" in str(found.assumed)
    assert "one token per digit" in str(found.assumed)


@pytest.mark.parametrize(
    ("model_type", "arguments", "message"),
    [
        ("llama", {"images": [(64, 64)]}, "LlamaForCausalLM has no M-RoPE"),
        ("llava", {"images": [(64, 64)]}, "has no M-RoPE"),
        ("minicpmv4_7", {"images": [(64, 64)]}, "pass its processor's output to request_length"),
        ("glm_image", {"images": [(64, 64)]}, "pass its processor's output to request_length"),
        ("hunyuan_vl", {"videos": [Video((64, 64), 4)]}, "takes no videos"),
        ("qwen2_vl", {}, "text, images or videos"),
        ("qwen2_vl", {"text": -1, "images": [(64, 64)]}, "text must be .* got -1"),
        ("qwen2_vl", {"images": [(0, 64)]}, "each side of a size must be at least 1"),
        ("qwen2_vl", {"images": [(1, 3, 4)]}, "must be multiples of 2"),
        ("qwen2_vl", {"images": [(9000, 9)]}, "aspect ratio"),
        ("qwen2_vl", {"images": [(2, 4, 4)]}, "one frame"),
        (
            "qwen2_vl",
            {"videos": [Video((64, 64))]},
            "frames of a video must be .* got None",
        ),
        (
            "qwen2_vl",
            {"videos": [Video((64, 64), 4, fps=0)]},
            "fps must be .* greater than 0, got 0",
        ),
        ("qwen2_vl", {"videos": [Video((4, 4, 4), 4)]}, "grid already has the number of frames"),
        ("ernie4_5_vl_moe", {"videos": [Video((3, 4, 4))]}, "a multiple of 2"),
    ],
)
def test_requests_that_cannot_be_are_refused(model_type, arguments, message):
    with pytest.raises(RopeError, match=message):
        visual_length(zoo.config(model_type), **arguments)

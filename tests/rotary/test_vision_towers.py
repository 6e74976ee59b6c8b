"""Vision towers: images larger than in training, the text model left alone, and both at once."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
import zoo_images
from conftest import relative
from transformers import AutoConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl

from hf_rope_ext import (
    AlreadyScaledError,
    ExportError,
    MethodParameterError,
    NotPatchedError,
    ProbeError,
    RopeWarning,
    UnsupportedModelError,
    describe,
    export,
    load_pretrained,
    patch_model,
    patched,
    unpatch_model,
)
from hf_rope_ext.cli.app import main
from hf_rope_ext.methods import NTK, Linear, Yarn
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.rotary.vision_towers import smallest_images

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")

ROOT = Path(__file__).parents[2]
TRAINED = 16  # patches along a side
# every model type of transformers 5.24 whose vision tower is axial
TOWERS = [
    "cohere_compass", "colqwen2", "cosmos3_omni", "diffusion_gemma", "dots3_note",
    "ernie4_5_vl_moe", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga",
    "hyperclovax_vision_v2", "kimi_k25", "lfm3_vl", "lighton_ocr", "minimax_m3_vl", "mistral3",
    "mistral_large4", "muse_glimmer", "muse_spark", "paddleocr_vl", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl",
    "qwen3_vl_moe", "qwen4_exp", "step3p7", "video_llama_3",
]  # fmt: skip
SHOWN = [name for name in TOWERS if name in zoo_images.FAMILIES]


def scale(model, method="ntk", **arguments):
    arguments.setdefault("original_max_position_embeddings", TRAINED)
    return patch_model(model, method, target="vision", **arguments)


def rotary_of(model):
    """The axial module of a model, patched or not, and the config of its tower."""
    found = [
        module
        for module in model.modules()
        if getattr(module, "rope_type", None) == "axial" and hasattr(module, "inv_freq")
    ]
    assert len(found) == 1
    return found[0]


def places(model_type, seed=0):
    """Positions as the family's tower passes them: rows of (h, w), mostly."""
    axes = 3 if model_type == "minimax_m3_vl" else 2
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 50, (9, axes), generator=generator)
    return points[None] if model_type == "diffusion_gemma" else points


def state(model):
    """Every tensor of a model and its configs, for comparing bit by bit."""
    tensors = {
        name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    return tensors, json.dumps(model.config.to_dict(), default=str)


def assert_same(model, before):
    tensors, config = state(model)
    assert config == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


@pytest.mark.sweep
def test_every_axial_tower_of_transformers_is_tested():
    def is_axial(config):
        own = getattr(config, "rope_parameters", None) or {}
        return own.get("rope_type") == "axial" or any(
            is_axial(part)
            for name in config.sub_configs
            if (part := getattr(config, name, None)) is not None
        )

    assert [name for name in zoo.MODEL_TYPES if is_axial(zoo.config(name))] == TOWERS
    for page in ("README.md", "docs/axial.md"):
        assert f"{len(TOWERS)} model types" in (ROOT / page).read_text(encoding="utf-8")


def test_the_documented_code_runs(capsys):
    text = (ROOT / "docs" / "axial.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[-1]
    model = zoo.build("qwen2_vl")

    exec(code, {"vlm": model})

    found = describe(model)
    assert (found.method["name"], found.vision) == ("yarn", None)
    assert "qwen2_vl_vision: ntk factor=2.0" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", TOWERS)
def test_linear_is_stock_on_divided_positions_axis_by_axis(model_type):
    model = zoo.build(model_type)
    before, points = state(model), places(model_type)
    stock = copy.deepcopy(rotary_of(model))
    x = torch.zeros(1, 1, 1)

    scale(model, "linear", factor=2)
    whole = rotary_of(model)(x, points)
    scale(model, "linear", factor={"w": 2.0}, replace=True)
    wide = rotary_of(model)(x, points)
    unpatch_model(model)

    for found, slowed in (
        (whole, 2.0),
        # Gemma 4 has columns first, MiniMax M3 has time before them
        (wide, {"diffusion_gemma": [2, 1], "minimax_m3_vl": [1, 1, 2]}.get(model_type, [1, 2])),
    ):
        expected = stock(x, points / torch.tensor(slowed))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same(model, before)


def layout(model_type, pairs):
    """Axis and frequency number of every number in a row of cos."""
    h, w = ([(axis, pair) for pair in range(pairs)] for axis in (0, 1))
    t = [(2, pair) for pair in range(pairs)]
    taking_turns = [(axis, pair) for pair in range(pairs) for axis in (1, 0)]
    dealt = [(0, pair) for pair in range(0, pairs, 2)] + [(1, pair) for pair in range(1, pairs, 2)]
    return {
        "qwen2_vl": (h + w) * 2,
        "kimi_k25": taking_turns * 2,
        "diffusion_gemma": h + h + w + w,
        "minimax_m3_vl": (h + w + t) * 2,
        "mistral3": dealt * 2,
    }[model_type]


@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "kimi_k25", "diffusion_gemma", "minimax_m3_vl", "mistral3"]
)
def test_cos_and_sin_are_those_of_a_loop_over_pairs_and_axes(model_type):
    model = zoo.build(model_type)
    points = places(model_type)
    names = {"diffusion_gemma": "wh", "minimax_m3_vl": "thw"}.get(model_type, "hw")
    methods = {"h": Yarn(4.0), "w": NTK(3.0)}
    base = rotary_of(model).config.rope_parameters["rope_theta"]
    width = 2 * rotary_of(model).inv_freq.numel()

    scale(model, methods)
    cos, sin = rotary_of(model)(torch.zeros(1, 1, 1), points)

    frequencies = {"t": [base ** (-2 * i / width) for i in range(width // 2)]}
    stretched = base * 3.0 ** (width / max(width - 2, 1))
    frequencies["w"] = [stretched ** (-2 * i / width) for i in range(width // 2)]
    frequencies["h"] = yarn(base, width, 4.0)
    places_of = layout(model_type, width // 2)
    assert cos.shape[-1] == len(places_of)
    temperature = 0.1 * math.log(4) + 1
    for index, (axis, pair) in enumerate(places_of):
        angles = points.reshape(-1, len(names))[:, axis].double() * frequencies[names[axis]][pair]
        for found, expected in ((cos, angles.cos()), (sin, angles.sin())):
            torch.testing.assert_close(
                found[..., index].flatten().double(), expected * temperature, rtol=0, atol=1e-5
            )


def yarn(base, width, factor):
    """YaRN's frequencies (arXiv:2309.00071), one pair at a time."""

    def pair_of(turns):
        return width * math.log(TRAINED / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(pair_of(32)), 0), min(math.ceil(pair_of(1)), width - 1)
    found = []
    for pair in range(width // 2):
        ramp = min(max((pair - low) / max(high - low, 1e-3), 0.0), 1.0)
        trained = base ** (-2 * pair / width)
        found.append(trained / factor * ramp + trained * (1 - ramp))
    return found


def tower_of(model):
    """The vision tower that runs by itself, and the name of its rotary module."""
    path = next(path for path, part in model.named_modules() if part is rotary_of(model))
    *_, tower = innermost_models(model, [path])[0][:1]
    if model.config.model_type == "paddleocr_vl":
        tower = model.model.visual
    return tower


def see(tower, seed=0):
    """What a tower makes of random patches."""
    shapes = smallest_images(tower, torch.device("cpu"))
    for given in shapes:
        generator = torch.Generator().manual_seed(seed)
        name = next(name for name in ("pixel_values", "hidden_states") if name in given)
        given[name] = torch.randn(given[name].shape, generator=generator)
        try:
            with torch.no_grad():
                return tower(**given)[0]
        except (RuntimeError, ValueError, IndexError, TypeError):
            if given is shapes[-1]:
                raise
    raise AssertionError


@pytest.mark.parametrize("model_type", TOWERS)
def test_ntk_is_the_stock_tower_with_another_base(model_type):
    model = zoo.build(model_type)
    before = see(tower_of(model))
    original = rotary_of(model)
    config = copy.deepcopy(original.config)
    width = 2 * original.inv_freq.numel()
    config.rope_parameters["rope_theta"] *= 4.0 ** (width / max(width - 2, 1))
    stock = copy.deepcopy(model)
    path = next(path for path, part in model.named_modules() if part is original)
    stock.set_submodule(path, type(original)(config))

    scale(model, factor=4)

    expected = see(tower_of(stock))
    assert relative(see(tower_of(model)), expected) < 1e-5
    assert relative(before, expected) > 1e-4
    unpatch_model(model)
    assert torch.equal(see(tower_of(model)), before)


@pytest.mark.parametrize("model_type", SHOWN)
def test_images_are_seen_with_the_new_frequencies_and_text_is_not_touched(model_type):
    model = zoo.build(model_type)
    text, image = zoo.inputs(model), zoo_images.image_inputs(model)
    before, plain, seen = state(model), zoo.run(model, **text), zoo.run(model, **image)

    scale(model, factor=4)

    assert torch.equal(zoo.run(model, **text), plain)
    assert not torch.equal(zoo.run(model, **image), seen)
    tower = next(path for path, part in model.named_modules() if part is rotary_of(model))
    for name, tensor in model.named_buffers():
        if not name.startswith(tower):
            assert torch.equal(tensor, before[0][name])
    unpatch_model(model)
    assert_same(model, before)
    assert torch.equal(zoo.run(model, **image), seen)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "glm4v", "ernie4_5_vl_moe", "qwen3_5"])
def test_stock_transformers_reads_ntk(model_type, tmp_path):
    model = zoo.build(model_type)
    scale(model, factor=4)
    image = zoo_images.image_inputs(model)
    expected = zoo.run(model, **image)

    model.save_pretrained(tmp_path)

    stock = type(model).from_pretrained(tmp_path).eval()
    assert relative(zoo.run(stock, **image), expected) < 1e-4
    assert rotary_of(stock).config.rope_parameters["rope_type"] == "axial"
    with pytest.raises(AlreadyScaledError, match="load it with load_pretrained"):
        scale(stock, factor=2)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_stock_transformers_stops_at_what_it_cannot_compute(method, tmp_path):
    model = zoo.build("qwen2_vl")
    scale(model, method, factor=4)
    image = zoo_images.image_inputs(model)
    expected = zoo.run(model, **image)

    model.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=rf"only axial rope, but requested hf_rope_ext\.{method}"):
        type(model).from_pretrained(tmp_path)
    assert torch.equal(zoo.run(load_pretrained(tmp_path), **image), expected)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "mistral3", "kimi_k25"])
def test_text_and_vision_are_patched_and_undone_apart(model_type):
    model = zoo.build(model_type)
    before = state(model)
    vision = rotary_of(model)
    patch_model(model, "yarn", factor=2)
    text_alone = state(model)
    assert rotary_of(model) is vision
    own = [name for name, part in text_alone[0].items() if not torch.equal(part, before[0][name])]
    assert own
    assert all(name.endswith("language_model.rotary_emb.inv_freq") for name in own)
    scale(model, "linear", factor=2)
    both = state(model)

    unpatch_model(model, target="text")
    scaled = rotary_of(model).inv_freq
    unpatch_model(model, target="vision")
    assert_same(model, before)
    scale(model, "linear", factor=2)
    assert torch.equal(rotary_of(model).inv_freq, scaled)
    patch_model(model, "yarn", factor=2)
    assert_same(model, both)
    with patched(
        model,
        "ntk",
        factor=8,
        target="vision",
        replace=True,
        original_max_position_embeddings=TRAINED,
    ):
        pass
    assert_same(model, both)
    unpatch_model(model, target="vision")
    assert_same(model, text_alone)
    scale(model, "linear", factor=2)
    with pytest.raises(AlreadyScaledError, match="vision is already patched with Linear"):
        scale(model, "linear", factor=2)
    with pytest.raises(AlreadyScaledError, match="model is already patched with Yarn"):
        patch_model(model, "linear", factor=2)
    assert_same(model, both)
    unpatch_model(model)
    assert_same(model, before)
    with pytest.raises(NotPatchedError, match="not patched in its vision model"):
        unpatch_model(model, target="vision")


@pytest.mark.parametrize("method", [Linear(2.0), {"h": Yarn(2.0), "w": Linear(4.0)}])
def test_both_patches_are_saved_and_restored(method, tmp_path, capsys, monkeypatch):
    model = zoo.build("qwen2_5_vl")
    patch_model(model, "dynamic_yarn", factor=4)
    scale(model, method)
    image = zoo_images.image_inputs(model)
    expected = zoo.run(model, **image)

    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)

    assert torch.equal(zoo.run(loaded, **image), expected)
    assert describe(loaded).to_dict() == describe(model).to_dict()
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.text_config.hf_rope_ext["method"]["name"] == "dynamic_yarn"
    assert saved.vision_config.hf_rope_ext["target"] == "vision"
    with pytest.raises(ExportError, match="no setting for the RoPE of a vision tower"):
        export(loaded)
    monkeypatch.setattr(sys, "argv", ["hf-rope", "export", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "saved with a patched vision tower" in capsys.readouterr().err


def test_both_are_described():
    model = zoo.build("qwen2_vl")
    assert describe(model).vision is None
    scale(model, "linear", factor={"h": 2.0, "w": 4.0})

    found = describe(model)

    assert found.method is None
    assert found.vision.model_type == "qwen2_vl_vision"
    assert [site.axis for site in found.vision.sites] == ["h", "w"]
    assert [site.largest_slowdown for site in found.vision.sites] == pytest.approx([2.0, 4.0])
    assert all(site.sound for site in found.vision.sites)
    assert found.vision.sites[0].original_max_position_embeddings == TRAINED
    assert "qwen2_vl_vision: per_axis" in str(found)
    assert all(f" [{axis}] " in str(found) for axis in "hw")
    tower = transformers.PixtralVisionModel(zoo.config("mistral3").vision_config)
    scale(tower, factor=2)
    assert describe(tower).method["name"] == "ntk"


def test_the_trained_side_is_read_or_asked_for():
    model = zoo.build("glm4v")  # images of 32 x 32, patches of 16 x 16
    patch_model(model, "ntk", target_length=6, target="vision")
    assert describe(model).vision.method == {"name": "ntk", "factor": 3.0}

    model = zoo.build("qwen2_vl")
    before = state(model)
    with pytest.raises(
        MethodParameterError, match=r"no image_size.*pass original_max_position_embeddings"
    ):
        patch_model(model, "ntk", factor=2, target="vision")
    assert_same(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dynamic_ntk", "factor": 2}, "dynamic_ntk follows the length of a request"),
        ({"factor": 2, "temperature": "logits"}, "temperature='logits' is for target='text'"),
        ({"factor": 2, "layer_types": ["full"]}, "layer_types is for target='text'"),
        ({"factor": 2, "limit_only": True}, "limit_only is for target='text'"),
        ({"factor": 2, "buckets": 2}, "buckets is for target='text'"),
        ({"factor": {"t": 2}}, "there is no axis 't'; .* 'h', 'w'"),
        ({"factor": 0.5}, "factor"),
        ({}, "ntk needs factor"),
        ({"factor": 2, "target": "audio"}, "target must be one of 'text', 'vision', got 'audio'"),
    ],
    ids=str,
)
def test_what_a_tower_cannot_be_asked_for_is_refused(arguments, message):
    model = zoo.build("qwen2_vl")
    before = state(model)

    with pytest.raises(MethodParameterError, match=message):
        patch_model(
            model,
            **{
                "method": "ntk",
                "target": "vision",
                "original_max_position_embeddings": TRAINED,
                **arguments,
            },
        )
    assert_same(model, before)


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("llava", r"clip_vision_model: .*position_embedding"),
        ("llama4", r"rotary_embedding \(Llama4VisionRotaryEmbedding\)"),
        ("llama", "positions: none"),
    ],
)
def test_a_tower_without_axial_frequencies_is_refused_by_name(model_type, found):
    with pytest.raises(UnsupportedModelError, match=f"no axial rotary embedding.*{found}"):
        scale(zoo.build(model_type), factor=2)


def test_an_attention_that_does_not_rotate_is_found(monkeypatch):
    model = zoo.build("qwen2_vl")
    before = state(model)
    monkeypatch.setattr(
        modeling_qwen2_vl, "apply_rotary_pos_emb_vision", lambda q, k, cos, sin: (q, k)
    )

    with pytest.raises(ProbeError, match="does not use its rotary embedding"):
        scale(model, factor=2)
    assert_same(model, before)


def test_casts_and_copies_keep_the_frequencies():
    model = scale(zoo.build("qwen2_5_vl"), "linear", factor={"h": 2, "w": 3})
    exact = rotary_of(model).inv_freq.clone()

    assert torch.equal(rotary_of(copy.deepcopy(model).bfloat16()).inv_freq, exact)
    copied = copy.deepcopy(model)
    unpatch_model(copied)
    assert torch.equal(rotary_of(model).inv_freq, exact)
    for dtype in (torch.bfloat16, torch.float16):
        cast = zoo.build("qwen2_5_vl").to(dtype)
        with pytest.warns(RopeWarning, match="rebuilt from the config, because it had been cast"):
            scale(cast, "linear", factor={"h": 2, "w": 3})
        assert torch.equal(rotary_of(cast).inv_freq, exact)
    with torch.device("meta"):
        empty = type(model)(zoo.config("qwen2_5_vl"))
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        scale(empty, factor=2)


def test_factor_one_changes_no_bit():
    model = zoo.build("qwen3_vl")
    image = zoo_images.image_inputs(model)
    before = zoo.run(model, **image)

    for method in ("linear", "ntk", "yarn"):
        scale(model, method, factor=1, replace=True)
        assert torch.equal(zoo.run(model, **image), before)


def test_an_adapter_keeps_the_record_of_its_tower(tmp_path):
    from peft import LoraConfig, get_peft_model

    from hf_rope_ext import save_pretrained

    base = zoo.build("qwen2_vl")
    base.save_pretrained(tmp_path / "base")
    image = zoo_images.image_inputs(base)
    scale(base, "linear", factor=2)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    expected = zoo.run(tuned, **image)

    save_pretrained(tuned, tmp_path / "adapter")

    loaded = load_pretrained(tmp_path / "adapter")
    assert relative(zoo.run(loaded, **image), expected) == 0.0
    assert describe(loaded).vision.method == {"name": "linear", "factor": 2.0}

"""A factor, a knob or a method for each axis of M-RoPE."""

import math
import warnings

import pytest
import torch
import zoo
import zoo_images
from conftest import relative
from decoding import CACHE
from method_knobs import FACTOR_ONLY, FREQUENCY_METHODS, PER_REQUEST, knobs
from transformers import AutoModelForImageTextToText, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_rope_ext import (
    MethodParameterError,
    RopeError,
    RopeWarning,
    UnknownMethodError,
    describe,
    export,
    load_pretrained,
    patch_model,
    unpatch_model,
)
from hf_rope_ext.methods import Linear, PerAxis, Yarn
from hf_rope_ext.parsing import parse_methods

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")

# the axis of each pair, written out from the definitions and the sections in the tiny configs
LAYOUTS = {
    "qwen2_5_vl": "tthhhwww",
    "qwen3_vl": "thwthwtt",
    "qwen3_5": "thwt",
    "glm4v": "tthhhwww",
    "glm_ocr": "tthhhwww",
    "paddleocr_vl": "tthhhwww",
    "ernie4_5_vl_moe": "hwhwhwtt",
    "cohere_compass": "thwthwtt",
    "qwen2_5_omni_thinker": "tthhhwww",
    "qwen3_omni_moe_thinker": "thwthwtt",
    "cosmos3_edge": "thwthwtt",
}
FACTORS = {"t": 4.0, "h": 1.0, "w": 2.0}


def rotary_of(model):
    """The patched rotary embedding, and the layer type it serves."""
    (rotary,) = [part for part in model.modules() if type(part).__name__ == "ExtendedRotary"]
    (label,) = rotary.rotations
    return rotary, label


def stock_frequencies(rope_type, factor, geometry):
    """What transformers' own function makes of one factor, and its attention factor."""
    config = LlamaConfig(
        hidden_size=geometry.rotary_dim,
        num_attention_heads=1,
        max_position_embeddings=zoo.TRAINED,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": geometry.base,
            "factor": factor,
            "original_max_position_embeddings": zoo.TRAINED,
        },
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config)


def cosines(rotary, label, positions):
    """The cosine of every pair, in the pairs' own order, whatever the family's layout."""
    layer_type = () if label is None else (label,)
    cos, _ = rotary(torch.zeros(1, positions.shape[-1], 1), positions, *layer_type)
    pairs = rotary.rotations[label].geometry.pairs
    if cos.shape[-1] == pairs:
        return cos[0]
    interleaved = torch.equal(cos[..., 0::2], cos[..., 1::2])
    return cos[0, :, ::2] if interleaved else cos[0, :, :pairs]


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_each_pair_turns_by_the_factor_of_its_own_axis(model_type, rope_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = zoo.build(model_type)
        patch_model(model, rope_type, factor=FACTORS)
        rotary, label = rotary_of(model)
        geometry = rotary.rotations[label].geometry
        stock = {axis: stock_frequencies(rope_type, FACTORS[axis], geometry) for axis in "thw"}
    positions = torch.tensor([[[3, 70, 200]], [[5, 90, 100]], [[7, 50, 150]]])

    found = cosines(rotary, label, positions)

    largest = max(scaling for _, scaling in stock.values())
    for pair, axis in enumerate(LAYOUTS[model_type]):
        frequency = float(stock[axis][0][pair])
        for token, position in enumerate(positions["thw".index(axis), 0].tolist()):
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            assert abs(float(found[token, pair]) - float(angle.cos()) * largest) < 1e-4


@pytest.mark.parametrize("name", FREQUENCY_METHODS)
def test_every_method_can_be_that_of_one_axis(name):
    """Its pairs turn as under the method alone, whose frequencies other tests hold to formulas."""
    whole, by_axis = zoo.build("qwen3_vl"), zoo.build("qwen3_vl")
    place = torch.tensor([[199]])
    trained = whole.model.language_model.rotary_emb.inv_freq

    patch_model(whole, name, **knobs(name))
    patch_model(by_axis, {"w": name}, **knobs(name))

    plans = [rotary_of(one)[0].plan(None, place)[0].flatten() for one in (whole, by_axis)]
    own = torch.tensor([axis == "w" for axis in LAYOUTS["qwen3_vl"]])
    assert torch.equal(plans[1], torch.where(own, plans[0], trained))


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "ernie4_5_vl_moe"])
def test_the_other_axes_keep_the_bits_they_were_trained_with(model_type):
    model = zoo.build(model_type)
    positions = torch.randint(0, 500, (3, 1, 50))
    before = model.model.language_model.rotary_emb(torch.zeros(1, 50, 1), positions)[0]

    patch_model(model, "linear", factor={"t": 8})
    rotary, label = rotary_of(model)
    frequencies, _ = rotary.plan(label, positions)
    trained = rotary.rotations[label].trained

    changed = {
        "thw"[row]
        for row in range(3)
        if not torch.equal(rotary(torch.zeros(1, 1, 1), one(row))[0], stock(rotary, row))
    }
    assert changed == {"t"}
    assert (frequencies == trained).sum() == len(LAYOUTS[model_type].replace("t", ""))
    patch_model(model, "linear", factor={"t": 1, "h": 1}, replace=True)
    assert torch.equal(rotary_of(model)[0](torch.zeros(1, 50, 1), positions)[0], before)
    unpatch_model(model)
    after = model.model.language_model.rotary_emb(torch.zeros(1, 50, 1), positions)[0]
    assert torch.equal(after, before)


def one(row):
    """A position that is 100 on one axis."""
    positions = torch.zeros(3, 1, 1, dtype=torch.int64)
    positions[row] = 100
    return positions


def stock(rotary, row):
    return rotary.original(torch.zeros(1, 1, 1), one(row))[0]


def test_the_same_for_every_axis_is_the_method_itself():
    by_axis, plain = zoo.build("qwen2_5_vl"), zoo.build("qwen2_5_vl")

    patch_model(by_axis, {"t": "yarn", "h": "yarn", "w": "yarn"}, factor=4)
    patch_model(plain, "yarn", factor=4)

    assert by_axis.config.to_dict() == plain.config.to_dict()
    assert by_axis.config.text_config.rope_parameters["rope_type"] == "yarn"


def test_methods_and_knobs_can_be_mixed():
    model = zoo.build("qwen3_vl")
    method = {"t": "yarn", "h": "linear"}

    patch_model(model, method, factor={"t": 4, "h": 2}, beta_fast=16, attention_factor=1.0)

    used = dict(rotary_of(model)[0].rotations[None].method.methods)
    assert used == {"t": Yarn(4, beta_fast=16, attention_factor=1.0), "h": Linear(2)}
    patch_model(model, {"t": Yarn(4), "w": "none"}, replace=True)
    patch_model(model, PerAxis((("t", Yarn(4)),)), replace=True)
    assert dict(rotary_of(model)[0].rotations[None].method.methods) == {"t": Yarn(4)}


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"])
def test_stock_tools_load_what_was_saved_with_the_same_logits(model_type, tmp_path):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model)
    untouched = zoo.run(model, **inputs)
    patch_model(model, {"t": "yarn", "h": "ntk", "w": "linear"}, factor={"t": 4, "h": 2, "w": 2})
    expected = zoo.run(model, **inputs)

    model.save_pretrained(tmp_path)

    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert relative(zoo.run(reloaded, **inputs), expected) < 1e-4
    assert relative(untouched, expected) > 1e-2
    assert export(model).config["text_config"]["rope_parameters"]["rope_type"] == "longrope"
    assert relative(zoo.run(load_pretrained(tmp_path), **inputs), expected) == 0.0


@pytest.mark.sweep
@pytest.mark.parametrize("method", sorted({*PER_REQUEST} & {*FACTOR_ONLY}))
def test_cached_generation_agrees_where_one_axis_follows_the_request(method, tmp_path):
    model = zoo.build("qwen2_5_vl")
    model.generation_config.suppress_tokens = zoo_images.SPECIAL
    inputs = zoo_images.image_inputs(model)
    before = zoo.run(model, **inputs)
    patch_model(model, method, factor={"t": 4})
    settings = {"max_new_tokens": 20, "do_sample": False}

    cached = model.generate(**inputs, **settings)
    cache_free = model.generate(**inputs, **settings, use_cache=False)

    assert torch.equal(cached, cache_free)
    assert relative(zoo.run(model, **inputs), before) > 1e-3
    model.save_pretrained(tmp_path)
    restored = load_pretrained(tmp_path)
    assert relative(zoo.run(restored, **inputs), zoo.run(model, **inputs)) == 0.0


@pytest.mark.parametrize("dynamic", ["h", "t"])
def test_the_largest_temperature_counts_at_every_length(dynamic):
    model = zoo.build("qwen2_5_vl")
    static = {"h": "t", "t": "h"}[dynamic]
    patch_model(model, {dynamic: "dynamic_yarn", static: "yarn"}, factor={dynamic: 8, static: 2})
    rotary = model.model.language_model.rotary_emb

    for length, largest in ((64, 2.0), (96, 2.0), (256, 4.0)):
        _, scaling = rotary.plan(None, torch.tensor([[length - 1]]))
        assert float(scaling) == pytest.approx(0.1 * math.log(largest) + 1)


def test_a_loop_that_outgrows_its_plan_turns_the_keys_of_one_axis():
    """Each row of the cache then equals one computed at once under the longer plan, in layer 1."""
    model = zoo.build("qwen2_5_vl")
    patch_model(model, "dynamic_linear", factor={"t": 8, "h": 1, "w": 1}, buckets=2)
    ids = torch.randint(10, 128, (1, 100))
    with torch.no_grad():
        grown = model(ids[:, :60], use_cache=True)[CACHE]
        for token in range(60, 100):
            model(ids[:, token : token + 1], **{CACHE: grown})
        at_once = model(ids, use_cache=True)[CACHE]

    for part in ("keys", "values"):
        found, expected = (getattr(one.layers[0], part) for one in (grown, at_once))
        assert relative(found, expected) < 1e-5


def test_describe_shows_each_axis():
    model = zoo.build("qwen3_vl")
    patch_model(model, {"t": "yarn", "w": "linear"}, factor={"t": 4, "w": 2})

    found = describe(model)

    assert [(site.axis, site.scaling, site.pairs) for site in found.sites] == [
        ("t", "yarn", 4),
        ("w", "linear", 2),
    ]
    assert found.sites[1].largest_slowdown == pytest.approx(2)
    assert found.sites[1].untouched_pairs == 0
    assert all(site.sound for site in found.sites)
    assert "[t]" in str(found)


def test_the_length_of_the_config_is_that_of_the_longest_axis():
    model = zoo.build("qwen3_vl")
    patch_model(model, "linear", factor={"t": 4, "h": 2})
    assert model.config.text_config.max_position_embeddings == 4 * zoo.TRAINED


def test_a_command_line_can_say_it():
    parsed = parse_methods("linear:factor.t=4:factor.h=2,yarn", 8.0)

    assert parsed == {
        "linear:factor.t=4:factor.h=2": PerAxis((("t", Linear(4)), ("h", Linear(2)))),
        "yarn": Yarn(8),
    }


WRONG = {
    "an axis that does not exist": ({"factor": {"x": 4}}, "no axis 'x'.*'t', 'h', 'w'"),
    "a factor below 1": ({"factor": {"t": 0.5}}, "at least 1, got 0.5"),
    "a factor in words": ({"factor": {"t": "4"}}, "finite number at least 1, got '4'"),
    "no factor at all": ({"factor": {}}, "at least one axis"),
    "a knob without its factor": ({"beta_fast": {"t": 16}}, "yarn needs factor"),
    "a knob nobody has": ({"factor": {"t": 4}, "beta": 1}, "no axis has a method with the knob"),
    "a factor of an axis without a method": (
        {"method": {"t": "yarn"}, "factor": {"h": 2}},
        "factor is given for axis 'h', which has no method",
    ),
    "a contradicting target": (
        {"factor": {"t": 4}, "target_length": 65},
        "target_length=65 contradicts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_error_and_nothing_changes(case):
    arguments, message = WRONG[case]
    model = zoo.build("qwen2_5_vl")
    before = model.config.to_dict()

    with pytest.raises(RopeError, match=message):
        patch_model(model, **{"method": "yarn", **arguments})

    assert model.config.to_dict() == before
    assert "ExtendedRotary" not in repr(model)


def test_a_text_model_has_no_axes(llama):
    with pytest.raises(MethodParameterError, match=r"values by axis \('t'\) are for models"):
        patch_model(llama, "yarn", factor={"t": 4})


def test_pairs_that_turn_by_two_axes_are_refused():
    """HunYuan-VL cuts its sections across the two halves of a head."""
    with pytest.raises(MethodParameterError, match="each turn by one of several"):
        patch_model(zoo.build("hunyuan_vl"), "yarn", factor={"w": 4})


def test_sections_of_another_width_are_warned_about():
    """Interleaved layouts take any sections, such as a default that stands in for lost ones."""
    model = zoo.build("qwen3_vl")
    model.model.language_model.rotary_emb.mrope_section = [24, 20, 20]
    with pytest.warns(RopeWarning, match=r"\[24, 20, 20\] covers 64 pairs, but 8 rotate"):
        patch_model(model, "yarn", factor=2)


def test_sections_that_stop_the_model_itself_are_one_error():
    model = zoo.build("qwen2_5_vl")
    model.model.language_model.rotary_emb.mrope_section = [16, 24, 24]
    with pytest.raises(RopeError, match=r"\[16, 24, 24\] covers 64 pairs, but 8 rotate"):
        patch_model(model, "yarn", factor=2)


def test_unknown_methods_by_axis_are_named():
    with pytest.raises(UnknownMethodError, match="Did you mean 'yarn'"):
        patch_model(zoo.build("qwen3_vl"), {"t": "yarm"}, factor=4)


def test_the_length_can_be_raised_alone():
    model = zoo.build("qwen2_5_vl")
    inputs = zoo_images.image_inputs(model)
    before = zoo.run(model, **inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RopeWarning)
        patch_model(model, "yarn", factor=4, limit_only=True)

    assert model.config.text_config.max_position_embeddings == 4 * zoo.TRAINED
    assert torch.equal(zoo.run(model, **inputs), before)
    with pytest.raises(MethodParameterError, match="limit_only raises the length limit alone"):
        patch_model(model, "none", limit_only=True, replace=True)
